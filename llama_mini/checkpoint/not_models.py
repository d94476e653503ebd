"""What people give in place of a model: what it is, and what to do about it."""

import re
from collections.abc import Collection, Mapping
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.io.files import ADAPTER_CONFIG
from llama_mini.errors import CheckpointFormatError
from llama_mini.validate import is_whole, join_names, short_repr

_MERGE = "merge it into its model and save the result (PEFT: merge_and_unload; mlx-lm: mlx_lm.fuse), then give that"
_FILES = {  # names of files that hold no weights of a model -> what such a file is
    "adapter*.safetensors *_adapters.safetensors adapter*.bin adapter*.npz": "an adapter without "
    f"{ADAPTER_CONFIG}, so its scale is unknown: put that file beside it",
    "*.distcp": "a part of a torch.distributed checkpoint: join the parts with `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch`, and convert the pytorch_model.bin that this makes",
    "*mp_rank_* global_step*": "a part of a DeepSpeed checkpoint: join the parts with its zero_to_fp32.py",
    "model_index.json": "a diffusion pipeline, not a language model",
    "*.onnx *.tflite *.mlmodelc *.mlpackage": "made for another runtime: give the checkpoint that it was made from",
    "*.nemo": "a NeMo archive: convert it to Hugging Face's format with NeMo's own scripts",
    "*.msgpack *.h5": "weights of Flax or TensorFlow: give those of PyTorch or safetensors",
    "*.incomplete *.part": "an unfinished download: finish it, or download the checkpoint again",
    "optimizer.* scheduler.* scaler.* rng_state* training_args.* trainer_state.json": "the state of a training run, "
    "without the model's weights: give the directory of the model",
}
_HUB_DOWNLOADS = ".cache/huggingface/download"  # where `hf download --local-dir` keeps unfinished files
_FOLDERS = ("*/config.json", "snapshots/*/config.json", "*/params.json", "*/*.gguf")
_DRAFT = "a draft head, which predicts for another model: give that model"
_CLASSIFIER = "a classifier or reward model, which generates no text"
_EXPERTS = "a mixture of experts, which is not read"
_LATENT = "a model with latent attention (MLA), which is not read"
_ARCHITECTURES = {  # in the name of an architecture or model_type -> what that is
    "classification|questionanswering|reward": _CLASSIFIER,
    "eagle|medusa|speculator": _DRAFT,
    "maskedlm|bert|electra|mpnet|bidirec|encoder": "an encoder, which generates no text",
    "whisper|wav2vec|hubert|speech|audio|forctc|tts": "a model of speech",
    "clip|vit|dino|image|vision|llava": "a model of images",
    "conditionalgeneration|^t5|bart": "an encoder with a decoder",
    "moe(?!hybrid)|mixtral|dbrx|gpt_?oss|deepseek_?v|llama_?4|qwen3_?next|solar_?open": _EXPERTS,
    "mamba|zamba|rwkv|xlstm|lfm|recurrent|jamba|bamba|falcon_?h|nemotron_?h|olmo_?hybrid": "a state space or recurrent "
    "model, which is not read",
    "minicpm3|youtu": _LATENT,
    "granite_?swa": "a model with learned attention sinks, which is not read",
}
_PARTS = {  # keys of config.json -> what a model with such a part is
    "vision_config": "a model of images and text",
    "audio_config": "a model of sound and text",
    "is_encoder_decoder": "an encoder with a decoder",
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _EXPERTS),
    "kv_lora_rank": _LATENT,
}
_TENSORS = {  # in a tensor's name -> what that tells
    r"(^|\.)lora_|\.(base_layer|modules_to_save|original_module)\.": f"an adapter that is not merged: {_MERGE}",
    r"(^|\.)(d2t|t2d|medusa_heads?\..*)$|^(model\.)?fc\.weight$": _DRAFT,
    r"(^|\.)(score|classifier|v_head\.summary)\.weight$": _CLASSIFIER,
}
_BASE = "general.base_model.0.name"
_PROJECTOR = "it turns images or sound into a model's input: give the file of the model itself"
_GGUF_TYPES = {  # general.type -> what that is
    "mmproj": _PROJECTOR,
    "imatrix": "it is an importance matrix, which llama.cpp quantises with: give the file of the model itself",
    "adapter": "it is an adapter: merge it into its model with llama.cpp's llama-export-lora, and give the result",
}


def told_by_name(names: Collection[str]) -> tuple[str, str] | None:
    """The first name that tells that a file holds no weights in a known format, and what it is instead."""
    table = ((pattern, what) for patterns, what in _FILES.items() for pattern in patterns.split())
    return next(((name, what) for pattern, what in table for name in matching(names, pattern)), None)


def describe_directory(directory: Path) -> str | None:
    """What a directory that has no weights in a known format holds, to follow its name; None if that is not known."""
    names = sorted(path.name for folder in (directory, directory / _HUB_DOWNLOADS) for path in folder.glob("*"))
    if (told := told_by_name(names)) is not None:
        return f"holds {told[0]}, {told[1]}"
    if folders := sorted({str(path.parent) for pattern in _FOLDERS for path in directory.glob(pattern)}):
        return f"holds no checkpoint itself, but its folders do; give one of them: {join_names(folders)}"
    return None


def describe_config(raw: Mapping[str, Any]) -> str | None:
    """What a config.json describes if not a language model: the key, and what it means. None if it may be one."""
    for key, what in _PARTS.items():
        if raw.get(key) and not (is_whole(raw[key]) and raw[key] == 1):  # one expert is a feed-forward layer
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


def describe_gguf(header: GGUFHeader) -> str | None:
    """The key or tensor that tells that a file is no whole model, and what it is. None if it may be a model."""
    values = header.metadata
    if str(values.get("general.architecture")) == "clip":
        return f"general.architecture is 'clip': {_PROJECTOR}"
    if str(kind := values.get("general.type", "model")) != "model":
        usual = "only files of type 'model' are read: give the file of the model itself"
        base = f"; its model is {short_repr(values[_BASE])}" if _BASE in values else ""
        return f"general.type is {short_repr(kind)}: {_GGUF_TYPES.get(str(kind), usual)}{base}"
    if str(count := values.get("split.count", 1)) not in ("0", "1"):
        merge = "llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE_FILE`, and give the result"
        return f"split.count is {short_repr(count)}: it is a part of a split model; merge the parts with {merge}"
    return None if header.tensors else "it holds no tensors: give the file of the model itself, not of its vocabulary"
