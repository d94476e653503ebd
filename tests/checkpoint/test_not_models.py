"""What is no model, but lies where one is looked for: one sentence says what it is and what to do about it."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from llama_mini.checkpoint.hf.config import from_hf
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointError, CheckpointFormatError, ConfigError, LlamaMiniError, LlamaMiniWarning
from llama_mini.generate import main
from llama_mini.model.llama import Llama
from tests.checkpoint.meta.test_directory import PARAMS, meta_tensors, model
from tests.tiny_families import logits, random_model
from tests.tiny_models import HF_TINY, random_tokens

LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def refusal(path: Path, expected: type[LlamaMiniError] = CheckpointError) -> str:
    with pytest.raises(expected) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- adapters, which are read where their model is: tests/checkpoint/adapters ---


def test_an_adapter_without_its_configuration(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert "holds adapter_model.safetensors, an adapter without adapter_config.json, so its scale" in refusal(tmp_path)


def test_an_adapter_beside_a_model_is_warned_of(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(LlamaMiniWarning, match="also holds an adapter .* only if it is given as an adapter"):
        assert open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (LORA, "an adapter that is not merged: merge it into its model"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "an adapter that is not merged"),
        ("lm_head.modules_to_save.default.weight", "an adapter that is not merged"),
        ("d2t", "a draft head, which predicts for another model: give that model"),
        ("fc.weight", "a draft head"),
        ("medusa_head.0.0.linear.weight", "a draft head"),
        ("score.weight", "a classifier or reward model"),
        ("v_head.summary.weight", "a classifier or reward model"),
    ],
)
def test_tensors_tell_what_they_are(tmp_path: Path, name: str, what: str) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {name: torch.ones(4, 32)}
    if name == LORA:
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointFormatError, match=rf"holds '{name}', so it is {what}"):
        open_checkpoint(tmp_path, pickles=Llama)


# --- directories ---


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("__0_0.distcp", "a part of a torch.distributed checkpoint: join the parts with `python -m torch"),
        ("mp_rank_00_model_states.pt", "a part of a DeepSpeed checkpoint: join the parts with its zero_to_fp32.py"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "a part of a DeepSpeed checkpoint"),
        ("global_step500/", "a part of a DeepSpeed checkpoint"),
        ("model_index.json", "a diffusion pipeline, not a language model"),
        ("model.onnx", "made for another runtime: give the checkpoint"),
        ("llama.mlpackage/", "made for another runtime"),
        ("llama.mlmodelc/", "made for another runtime"),
        ("model.tflite", "made for another runtime"),
        ("model.nemo", "a NeMo archive: convert it"),
        ("flax_model.msgpack", "weights of Flax or TensorFlow: give those of PyTorch or safetensors"),
        ("tf_model.h5", "weights of Flax or TensorFlow"),
        ("model.safetensors.incomplete", "an unfinished download: finish it, or download the checkpoint again"),
        (".cache/huggingface/download/abc.incomplete", "an unfinished download"),
        ("consolidated.00.pth.part", "an unfinished download"),
        ("optimizer.pt", "the state of a training run, without the model's weights"),
        ("optimizer.bin", "the state of a training run"),
        ("scheduler.pt", "the state of a training run"),
        ("trainer_state.json", "the state of a training run"),
    ],
)
def test_a_directory_of_something_else(tmp_path: Path, name: str, what: str, config: bool) -> None:
    if config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | HF_TINY))
    path = tmp_path / name
    (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt" or path.stem == "optimizer":
        torch.save({"step": 1}, path)
    elif not name.endswith("/"):
        path.write_bytes(b"something")
    assert f"{tmp_path} holds {path.name}, {what}" in refusal(tmp_path, CheckpointFormatError)
    with pytest.raises(CheckpointFormatError, match=f"holds {path.name}, "):
        convert(tmp_path, tmp_path / "converted")


def test_weights_beside_a_training_state_are_seen(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt"):
        torch.save({}, tmp_path / name)
    assert "it has no config.json" in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")
def test_what_torch_saves_in_parts(tmp_path: Path) -> None:
    dcp.save({"weight": torch.zeros(3)}, checkpoint_id=tmp_path, no_dist=True)
    assert "holds __0_0.distcp, a part of a torch.distributed checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize(
    "inner", ["checkpoint-500/config.json", "snapshots/abc/config.json", "original/params.json", "Q4/model.gguf"]
)
def test_the_checkpoint_lies_in_a_folder(tmp_path: Path, inner: str) -> None:
    (tmp_path / inner).parent.mkdir(parents=True)
    (tmp_path / inner).write_text("{}")
    assert f"its folders do; give one of them: {(tmp_path / inner).parent}" in refusal(tmp_path)


def test_an_unfinished_download_of_metas_weights(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    (tmp_path / "consolidated.00.pth.incomplete").write_bytes(b"PK")
    assert "holds consolidated.00.pth.incomplete, an unfinished download" in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore:.* has no tokenizer", "ignore:params.json states no")
def test_a_directory_with_both_configurations(tmp_path: Path) -> None:
    """Releases of Mistral: the names of the weights tell which is meant."""
    theirs, tokens = model(), random_tokens(1, 20, vocab_size=90)
    save_file({name: t for name, (t, _) in meta_tensors(theirs).items()}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    meta_alone = Llama.from_pretrained(tmp_path)(tokens)
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").rename(tmp_path / "config.json")
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), meta_alone)
    (tmp_path / "params.json").unlink()
    assert "holds neither model.safetensors nor" in refusal(tmp_path)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "model.safetensors")
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(tokens), meta_alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.fp16.bin"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ["model.pt"],
        ["weights.ckpt"],
        ["diffusion_pytorch_model.bin"],
    ],
)
@pytest.mark.filterwarnings("ignore:.* has no tokenizer")
def test_pickles_of_any_name_are_converted(tmp_path: Path, names: list[str]) -> None:
    theirs = random_model("llama", 0)
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    state = list(theirs.state_dict().items())
    for i, name in enumerate(names):
        torch.save(dict(state[i :: len(names)]), tmp_path / "hf" / name)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):  # of the training run, beside the weights
        torch.save({"step": 1}, tmp_path / "hf" / name)
    assert f"holds its weights as a pickle, {names[0]}, which can run code" in refusal(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "converted")
    tokens = random_tokens(1, 20)
    ours = Llama.from_pretrained(tmp_path / "converted")(tokens)
    torch.testing.assert_close(ours, logits(theirs, tokens), rtol=0, atol=2e-5)


# --- files ---


def archive(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("./model_config.yaml"), io.BytesIO())


@pytest.mark.parametrize(
    ("name", "write", "what"),
    [
        ("model.gguf", archive, "an archive: unpack it"),
        ("model.gguf", lambda path: path.write_bytes(gzip.compress(b"{}")), "an archive"),
        ("model.gguf", lambda path: path.write_bytes(b"tjgg\x03\0\0\0" + bytes(90)), "a file in GGML's old format"),
        ("model.gguf", lambda path: torch.save({}, path), "a PyTorch pickle: convert its directory"),
        ("model.nemo", archive, "a NeMo archive"),
        ("optimizer.pt", lambda path: torch.save({}, path), "the state of a training run"),
        ("model.onnx", lambda path: path.write_bytes(bytes(90)), "made for another runtime"),
        ("model.onnx", lambda path: path.write_bytes(b"<html>"), "an HTML page"),
    ],
)
def test_a_file_is_told_by_its_content_or_else_its_name(
    tmp_path: Path, name: str, write: Callable[[Path], Any], what: str
) -> None:
    write(tmp_path / name)
    assert f"is not a checkpoint: it is {what}" in refusal(tmp_path / name, CheckpointFormatError)


# --- configurations of other kinds of model ---


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "'BertModel' is an encoder, which generates no text"),
        ({"model_type": "xlm-roberta"}, "'xlm-roberta' is an encoder"),
        ({"model_type": "mpnet", "architectures": ["MPNetModel"]}, "an encoder"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "a classifier"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "a model of images"),
        ({"model_type": "whisper", "is_encoder_decoder": False}, "'whisper' is a model of speech"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, "a model of speech"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is_encoder_decoder is True: this is an encoder with a de"),
        ({"model_type": "llava", "vision_config": {"a": 1}}, "vision_config is {'a': 1}: this is a model of images"),
        ({"model_type": "qwen2_audio", "audio_config": {"a": 1}}, "audio_config is {'a': 1}: this is a model of sound"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier or reward model, which generates no te"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "a draft head, which predicts for another model"),
        ({"architectures": ["LlamaForRewardModel"]}, "a classifier or reward model"),
        ({"architectures": [5, "MedusaModel"]}, "a draft head"),
    ],
)
def test_a_configuration_of_another_kind(raw: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf({"model_type": "llama"} | HF_TINY | raw)
    assert what in str(caught.value)
    assert "; the model_types that can be read are llama, mistral" in str(caught.value)


@pytest.mark.parametrize("more", [{"vision_config": None, "is_encoder_decoder": False}, {"architectures": None}])
@pytest.mark.filterwarnings("ignore:config.json. unknown")
def test_a_language_model_is_no_other_kind(more: dict[str, Any]) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3", "olmo2"):
        name = type(random_model(family, 0)).__name__
        assert from_hf({"model_type": family, "architectures": [name]} | HF_TINY | more)


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").touch()
    assert main(["--model", str(tmp_path), "hi"]) == 3
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds model.onnx, made for another runtime")
