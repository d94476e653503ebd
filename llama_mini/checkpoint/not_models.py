"""What people give in place of a model, told by content where that is possible: what it is, and what to do about it."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.io.files import inside, read_json
from llama_mini.errors import CheckpointError, CheckpointFormatError
from llama_mini.validate import join_names, short_repr

ADAPTER_CONFIG = "adapter_config.json"
_MERGE = "merge it into that model and save the result (PEFT: merge_and_unload; mlx-lm: mlx_lm.fuse), then give that"
_ADAPTER = f"an adapter, not a whole model: {_MERGE}"
_EXPORTED = "made for another runtime: give the Hugging Face checkpoint that it was made from"
_UNFINISHED = "an unfinished download: finish it, or download the checkpoint again"
_TRAINING = "the state of a training run, without the model's weights: give the directory of the model"
_DEEPSPEED = "the parts of a DeepSpeed checkpoint: join them with its zero_to_fp32.py"
_FILES = {  # pattern in a directory without weights that can be read -> what such a file means
    "adapters.safetensors": _ADAPTER,
    "adapter_model.*": _ADAPTER,
    "*.distcp": "the parts of a torch.distributed checkpoint: join them with `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch`, and convert the pytorch_model.bin that this makes",
    "*mp_rank_*": _DEEPSPEED,
    "*zero_pp_rank_*": _DEEPSPEED,
    "global_step*": _DEEPSPEED,
    "latest_checkpointed_iteration.txt": "a Megatron checkpoint: convert it to Hugging Face's format",
    "model_index.json": "a diffusion pipeline, not a language model",
    "*.onnx": _EXPORTED,
    "openvino_model.xml": _EXPORTED,
    "coremldata.bin": _EXPORTED,
    "Data/com.apple.CoreML": _EXPORTED,
    "*.mlmodelc": _EXPORTED,
    "*.mlpackage": _EXPORTED,
    "*.tflite": _EXPORTED,
    "*.engine": _EXPORTED,
    "*.nemo": "a NeMo archive: convert it to Hugging Face's format with NeMo's own scripts",
    "*.msgpack": "weights of Flax: give those of PyTorch or safetensors",
    "*.h5": "weights of TensorFlow: give those of PyTorch or safetensors",
    "*.incomplete": _UNFINISHED,
    ".cache/huggingface/download/*.incomplete": _UNFINISHED,
    "*.part": _UNFINISHED,
    "*.crdownload": _UNFINISHED,
    "*.aria2": _UNFINISHED,
    "optimizer.*": _TRAINING,
    "scheduler.pt": _TRAINING,
    "trainer_state.json": _TRAINING,
}
_DRAFT = "a draft head, which predicts for another model: give that model"
_CLASSIFIER = "a classifier or reward model, which generates no text"
_FOLDERS = ("*/config.json", "snapshots/*/config.json", "*/params.json", "*/*.gguf")
_ARCHITECTURES = {  # in the name of an architecture or model_type -> what that is
    "classification|questionanswering|reward": _CLASSIFIER,
    "eagle|medusa|speculator": _DRAFT,
    "maskedlm|bert|electra|mpnet|bidirec|encoder": "an encoder, which generates no text",
    "whisper|wav2vec|hubert|speech|audio|forctc|tts": "a model of speech",
    "clip|vit|dino|image|vision|llava": "a model of images",
    "conditionalgeneration|^t5|bart": "an encoder with a decoder",
}
_PARTS = {  # keys of config.json -> what a model with such a part is
    "vision_config": "a model of images and text",
    "audio_config": "a model of sound and text",
    "is_encoder_decoder": "an encoder with a decoder",
}
_TENSORS = {  # in a tensor's name -> what that tells
    r"(^|\.)lora_|\.(base_layer|modules_to_save|original_module)\.": f"an adapter that is not merged: {_MERGE}",
    r"(^|\.)(d2t|t2d|medusa_heads?\..*)$|^(model\.)?fc\.weight$": _DRAFT,
    r"(^|\.)(score|classifier|v_head\.summary)\.weight$": _CLASSIFIER,
}


def describe_directory(directory: Path) -> str | None:
    """What a directory that has no weights in a known format holds, to follow its name; None if that is not known."""
    if (directory / ADAPTER_CONFIG).is_file():
        return describe_adapter(directory)
    for pattern, what in _FILES.items():
        if found := next(iter(sorted(directory.glob(pattern))), None):
            return f"holds {found.name}, {what}"
    folders = sorted({str(path.parent) for pattern in _FOLDERS for path in directory.glob(pattern)})
    return (
        f"holds no checkpoint itself, but its folders do; give one of them: {join_names(folders)}" if folders else None
    )


def describe_adapter(directory: Path) -> str:
    """What the adapter_config.json of PEFT or mlx-lm says, to follow the directory's name."""
    try:
        raw = read_json(inside(directory, ADAPTER_CONFIG))
    except CheckpointError:
        raw = {}
    kind, base = (
        next((short_repr(raw[key]) for key in keys if isinstance(raw.get(key), str)), "unknown")
        for keys in (("peft_type", "fine_tune_type"), ("base_model_name_or_path", "model"))
    )
    return f"holds an adapter of type {kind} for the model {base}, not a whole model: {_MERGE}"


def describe_config(raw: Mapping[str, Any]) -> str | None:
    """What a config.json describes if not a language model: the key, and what it means. None if it may be one."""
    for key, what in _PARTS.items():
        if raw.get(key):
            return f"{key} is {short_repr(raw[key])}: this is {what}"
    stated = raw.get("architectures")
    for name in (*(stated if isinstance(stated, list) else ()), raw.get("model_type")):
        for pattern, what in _ARCHITECTURES.items():
            if isinstance(name, str) and re.search(pattern, name, re.IGNORECASE):
                return f"{short_repr(name)} is {what}"
    return None


def check_names(path: Path, names: Collection[str]) -> None:
    """Refuses tensors whose names tell that they are no whole language model. Raises CheckpointFormatError."""
    for pattern, what in _TENSORS.items():
        if name := next(filter(re.compile(pattern).search, names), None):
            raise CheckpointFormatError(f"{path} holds {short_repr(name)}, so it is {what}")
