"""A directory that holds an adapter alone opens as its model with the adapter, wherever that model is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import model_of_adapter, open_checkpoint
from llama_mini.errors import CheckpointError, LlamaMiniError, RequestError
from llama_mini.model.llama import Llama
from tests.checkpoint.adapters.tiny_adapters import TOKENS, expect, ours, write_adapter
from tests.tiny_families import logits, random_model

NAME = "base_model.model.model.layers.1.mlp.down_proj"


def write(directory: Path, base: str | None, **more: Any) -> Path:
    values = torch.Generator().manual_seed(1)
    down = random_model("llama", 0).model.layers[1].mlp.down_proj.weight
    tensors = {f"{NAME}.lora_A.weight": torch.randn(2, down.shape[1], generator=values) / 4}
    tensors |= {f"{NAME}.lora_B.weight": torch.randn(down.shape[0], 2, generator=values) / 4}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": base}
    return write_adapter(directory, config | more, tensors)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """Logits of the model with the adapter; W + alpha / r · B·A."""
    theirs = random_model("llama", 0)
    values = torch.Generator().manual_seed(1)
    weight = theirs.model.layers[1].mlp.down_proj.weight
    a = torch.randn(2, weight.shape[1], generator=values) / 4
    weight.data += 3 * (torch.randn(weight.shape[0], 2, generator=values) / 4) @ a
    return logits(theirs, TOKENS)


@pytest.mark.parametrize(
    ("place", "base"),
    [
        ("models/base", "{tmp}/models/base"),
        ("models/base", "models/base"),  # from the working directory
        ("run/base", "../base"),  # from the adapter
        ("run/adapter/base", "base"),
        ("run/base", "org/base"),  # a folder beside it, of that name
        ("run/base", "/home/someone/else/base"),
    ],
)
def test_where_its_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Tensor, place: str, base: str
) -> None:
    monkeypatch.chdir(tmp_path)
    random_model("llama", 0).save_pretrained(tmp_path / place)
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    write(adapter, base.format(tmp=tmp_path))
    assert model_of_adapter(adapter).resolve() == tmp_path / place
    expect(ours(adapter), expected)
    expect(ours(adapter / "adapter_model.safetensors"), expected)


def test_what_training_leaves_beside_it(tmp_path: Path, expected: Tensor) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "base")
    adapter = write(tmp_path / "adapter", "base")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "0000100_adapters.safetensors"):
        (adapter / name).write_bytes(b"")
    expect(ours(adapter), expected)


@pytest.mark.parametrize(("revision", "asked"), [(None, "org/base"), ("v2", "org/base@v2"), ("unsloth", "org/base")])
def test_its_model_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Tensor, revision: str | None, asked: str
) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "snapshot")
    names = []
    monkeypatch.setattr(
        "llama_mini.checkpoint.hf.hub.fetch_from_hub", lambda name, _: names.append(name) or tmp_path / "snapshot"
    )
    expect(ours(write(tmp_path / "base", "org/base", revision=revision)), expected)  # its own name is no model's
    assert names == [asked]


def test_an_adapter_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Tensor) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(
        "llama_mini.checkpoint.hf.hub.fetch_from_hub", lambda name, _: write(tmp_path / "fetched", None)
    )
    expect(ours(tmp_path / "base", "org/adapter"), expected)


def test_an_adapter_beside_the_configuration_of_its_model(tmp_path: Path, expected: Tensor) -> None:
    theirs = random_model("llama", 0)
    theirs.save_pretrained(tmp_path / "base")
    theirs.config.save_pretrained(tmp_path / "adapter")
    expect(ours(write(tmp_path / "adapter", str(tmp_path / "base"))), expected)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "holds an adapter that does not name its model; give the model, and the adapter with --adapter"),
        ("absent", r"is an adapter for absent, found at none of absent, .*/adapter/absent, .*/absent;"),
        (".", r"\. is not a checkpoint: it has no config.json"),
        ("{tmp}/adapter", "holds an adapter for .*/adapter, which is an adapter too; give the model"),
        ("{tmp}/other", "holds an adapter for .*/other, which is an adapter too; give the model"),
        ("{tmp}/empty", "empty is not a checkpoint: it has no config.json"),
        ("a\0b", "is an adapter for a.*b, found at none of a"),
        ("org/base", "the model of .*/adapter is not found: .* HF_HUB_OFFLINE is set.*; give the model, and"),
    ],
)  # fmt: skip
def test_no_model_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str | None, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "other", str(tmp_path / "adapter"))
    adapter = write(tmp_path / "adapter", None if base is None else base.format(tmp=tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_model(tmp_path: Path) -> None:
    random_model("llama", 0, hidden_size=64).save_pretrained(tmp_path / "base")
    adapter = write(tmp_path / "adapter", "org/other")
    with pytest.raises(CheckpointError, match=r"needs \(64, 2\); the adapter was made for org/other: give that model$"):
        open_checkpoint(tmp_path / "base", adapter=adapter)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (5, "adapter must be a directory or a hub name, or several, not 5"),
        ([5], "adapter must be a directory or a hub name, or several, not 5"),
        ({"a": "2"}, "the weight of the adapter a must be a finite number from .* not '2'"),
        ({"a": float("nan")}, "the weight of the adapter a must be a finite number from .* not nan"),
        (["a", "a"], "adapter: 'a' is given twice"),
        ("absent", r"absent has no adapter_config\.json"),
    ],
)
def test_what_is_no_adapter(tmp_path: Path, adapter: Any, message: str) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    with pytest.raises(LlamaMiniError, match=message):
        open_checkpoint(tmp_path, adapter=adapter)


def test_one_adapter_twice(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "base")
    adapter = write(tmp_path / "adapter", "base")
    with pytest.raises(RequestError, match=r"adapter: .* is given twice"):
        open_checkpoint(adapter, adapter=adapter)


def test_the_model_is_named_where_it_is_loaded(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "base")
    source = open_checkpoint(write(tmp_path / "adapter", "base"))
    assert source.adapters == {tmp_path / "adapter": f"LoRA of rank 2 on 1 matrices, 1 × {tmp_path / 'adapter'}"}
    assert load_model(Llama, source, None, "cpu").dtype == torch.float32
