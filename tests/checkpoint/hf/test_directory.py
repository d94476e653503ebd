"""Tensors of a checkpoint: which files are read, that loading is strict, and which dtype comes out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    ConfigError,
)
from llama_mini.machine import dtype_name
from llama_mini.model.llama import Llama
from tests.tiny_models import hf_llama, random_tokens

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.layers.1.post_attention_layernorm.weight"
Edit = Callable[[dict[str, Tensor]], Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint that transformers wrote, in one file."""
    hf_llama(1).save_pretrained(tmp_path)
    return tmp_path


def edit(directory: Path, change: Edit) -> None:
    """Rewrites model.safetensors with its tensors changed."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


def refusal(directory: Path, expected: type[CheckpointError]) -> str:
    with pytest.raises(expected) as caught:
        Llama.from_pretrained(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_fault_is_in_one_report(directory: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"], tensors[NORM]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 5)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(48, 16)

    edit(directory, change)
    message = refusal(directory, CheckpointMismatchError)
    for part in (
        f"2 missing: lm_head.weight, {NORM}",
        "2 unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight",
        "1 misshaped: model.layers.0.self_attn.k_proj.weight is (48, 16), not (16, 48)",
        str(directory),
    ):
        assert part in message


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(NORM),
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        lambda tensors: tensors.update({NORM: torch.ones(1)}),
        lambda tensors: tensors.update({NORM: torch.ones(48, 1)}),
        lambda tensors: tensors.update({NORM.removeprefix("model."): tensors.pop(NORM)}),
    ],
    ids=["dropped", "added", "broadcastable", "of another rank", "renamed"],
)
def test_nothing_is_forgiven(directory: Path, change: Edit) -> None:
    edit(directory, change)
    assert "_norm" in refusal(directory, CheckpointMismatchError).replace("layernorm", "_norm")


def test_a_config_of_other_sizes_is_a_mismatch(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=3)
    assert "9 missing: model.layers.2.input_layernorm.weight" in refusal(directory, CheckpointMismatchError)
    edit_config(directory, num_hidden_layers=1)
    assert "9 unexpected: model.layers.1.input_layernorm.weight" in refusal(directory, CheckpointMismatchError)


def test_tables_of_old_checkpoints_are_harmless(directory: Path) -> None:
    expected = Llama.from_pretrained(directory)(random_tokens(1, 5))
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for i in (0, 1)}
    edit(directory, lambda tensors: tensors.update(tables | {"rope.freqs": torch.full((4,), 7.0).half()}))
    assert torch.equal(Llama.from_pretrained(directory)(random_tokens(1, 5)), expected)


def test_an_untied_model_needs_its_head(directory: Path) -> None:
    edit(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert "1 missing: lm_head.weight" in refusal(directory, CheckpointMismatchError)


def test_a_directory_without_weights_is_named(directory: Path) -> None:
    (directory / SINGLE).unlink()
    assert f"{directory} holds neither {SINGLE} nor" in refusal(directory, CheckpointIncompleteError)


def test_more_layers_than_tensors_are_refused_before_they_are_built(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9_999}))
    assert "asks for 9999 layers" in refusal(directory, CheckpointMismatchError)
    save_file({}, directory / SINGLE)
    (directory / "config.json").write_text(json.dumps(config))
    assert "holds no tensors" in refusal(directory, CheckpointFormatError)


def test_sizes_whose_product_overflows_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    huge = {"hidden_size": 2**31 - 2, "intermediate_size": 2**31 - 1, "head_dim": 2**30}
    (directory / "config.json").write_text(json.dumps(config | huge))
    assert "no model of these sizes" in refusal(directory, ConfigError)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little") + b"{}", b"<html>" * 50, b"PK\x03\x04" * 9],
    ids=["empty", "seven bytes", "2^64 - 1", "longer than the file", "html", "zip"],
)
def test_a_broken_file_is_one_sentence(directory: Path, content: bytes) -> None:
    (directory / SINGLE).write_bytes(content)
    assert str(directory / SINGLE) in refusal(directory, CheckpointFormatError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_is_named(directory: Path, value: float) -> None:
    edit(directory, lambda tensors: tensors[NORM].index_fill_(0, torch.tensor([3]), value))
    assert f"{NORM} holds NaN or infinity" in refusal(directory, CheckpointFormatError)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x"], ids=["cut", "trailing"])
def test_data_must_be_as_long_as_its_header_says(directory: Path, change: Callable[[bytes], bytes]) -> None:
    (directory / SINGLE).write_bytes(change((directory / SINGLE).read_bytes()))
    assert str(directory / SINGLE) in refusal(directory, CheckpointFormatError)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool])
def test_weights_of_another_kind_are_named(directory: Path, dtype: torch.dtype) -> None:
    edit(directory, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    message = refusal(directory, CheckpointFormatError)
    assert NORM in message
    assert "F64, F32, F16, BF16" in message


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("asked", [None, "float32", torch.float16, "bfloat16"], ids=str)
def test_the_dtype_is_the_files_or_the_one_asked_for(
    directory: Path, stored: torch.dtype, asked: torch.dtype | str | None
) -> None:
    exact = load_file(directory / SINGLE)
    edit(directory, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    model = Llama.from_pretrained(directory, dtype=asked)
    wanted = stored if asked is None else getattr(torch, dtype_name(asked))
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert torch.equal(model.get_parameter("layers.1.feed_forward.pre_norm.weight"), exact[NORM].to(stored).to(wanted))


@pytest.mark.parametrize(("stated", "expected"), [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_mixed_dtypes_become_one(directory: Path, stated: str | None, expected: torch.dtype) -> None:
    edit(directory, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "norm" not in n}))
    edit_config(directory, dtype=stated)
    model = Llama.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model(random_tokens(1, 3)).dtype == torch.float32
