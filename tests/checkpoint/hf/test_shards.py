"""Weights in shards: the index decides which files are read, and from which a tensor that two of them hold."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.checkpoint.io.files import INDEX
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointPathError,
    LlamaMiniWarning,
)
from llama_mini.model.llama import Llama
from tests.checkpoint.hf.test_directory import NORM, SINGLE, refusal
from tests.tiny_models import hf_llama, random_tokens

TOKENS = random_tokens(1, 9)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in four shards or more."""
    hf_llama(1).save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def add(shard: Path, tensors: dict[str, Tensor]) -> None:
    save_file(load_file(shard) | tensors, shard, metadata={"format": "pt"})


def expect(directory: Path) -> None:
    torch.testing.assert_close(Llama.from_pretrained(directory)(TOKENS), hf_llama(1)(TOKENS).logits, rtol=0, atol=2e-5)


def weight_map(directory: Path) -> dict[str, str]:
    return dict(json.loads((directory / INDEX).read_text())["weight_map"])


def write_index(directory: Path, names: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_shards_are_read_as_one_file(sharded: Path) -> None:
    assert len(set(weight_map(sharded).values())) >= 4
    expect(sharded)


def test_only_what_the_index_names_is_read(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"not for us")
    (sharded / "original").mkdir()
    (sharded / "model-00099-of-00099.safetensors").write_bytes(b"left over")
    assert Llama.from_pretrained(sharded)


def test_missing_shards_are_named_before_anything_is_read(sharded: Path) -> None:
    names = sorted(set(weight_map(sharded).values()))
    for name in names:
        (sharded / name).write_bytes(b"garbage: reading it would be another error")
    for name in names[1:3]:
        (sharded / name).unlink()
    message = refusal(sharded, CheckpointIncompleteError)
    assert f"missing 2 of {len(names)} shards: {names[1]}, {names[2]}" in message


def test_a_name_in_other_case_is_told_from_a_missing_file(sharded: Path) -> None:
    names = weight_map(sharded)
    write_index(sharded, {name: file.replace("model-", "Model-") for name, file in names.items()})
    if not (sharded / names[NORM].replace("model-", "Model-")).exists():  # where case matters
        assert f"; rename {min(names.values())}, model-" in refusal(sharded, CheckpointIncompleteError)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..", ".", "", "sub/x.safetensors"])
def test_a_shard_outside_its_directory_is_refused(sharded: Path, name: str) -> None:
    write_index(sharded, weight_map(sharded) | {NORM: name})
    assert f"{name!r} is not a plain file name" in refusal(sharded, CheckpointPathError)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {}}', INDEX),
        ("<html>", "is not JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(sharded: Path, index: str, message: str) -> None:
    (sharded / INDEX).write_text(index)
    assert message in refusal(sharded, CheckpointError)


def test_a_tensor_that_no_shard_holds_is_named(sharded: Path) -> None:
    names = weight_map(sharded)
    write_index(sharded, names | {"model.extra.weight": names[NORM]})
    assert "names tensors that no shard holds: model.extra.weight" in refusal(sharded, CheckpointIncompleteError)


def test_the_index_tells_which_of_two_tensors_is_meant(sharded: Path) -> None:
    """Shards of a later save, written over those of an earlier one."""
    names = weight_map(sharded)
    for other in set(names.values()) - {names[NORM]}:
        add(sharded / other, {NORM: torch.ones(48)})
    expect(sharded)
    write_index(sharded, {name: file for name, file in names.items() if name != NORM})
    assert f"{NORM} is in both" in refusal(sharded, CheckpointFormatError)


def test_a_shard_may_hold_more_than_the_index_names(sharded: Path) -> None:
    names = weight_map(sharded)
    add(sharded / names[NORM], {"optimizer.step": torch.ones(1), "model.layers.0.rotary_emb.inv_freq": torch.ones(4)})
    with pytest.warns(LlamaMiniWarning, match=r"index\.json does not name optimizer\.step: not read") as warned:
        expect(sharded)
    assert len(warned) == 1
    add(sharded / names[NORM], {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})  # it would change the model
    with pytest.warns(LlamaMiniWarning):
        assert "unexpected: model.layers.0.self_attn.q_proj.bias" in refusal(sharded, CheckpointMismatchError)


@pytest.mark.parametrize(
    "change",
    [
        lambda names: {name: f"./{file}" for name, file in names.items()},
        lambda names: {name: f"././{file}" if "0" in name else file for name, file in names.items()},
        lambda names: {name: file for name, file in names.items() if name != NORM},  # forgotten: transformers reads it
        lambda names: names | {NORM: next(file for file in names.values() if file != names[NORM])},  # of another save
        lambda names: names | {"model.layers.0.self_attn.rotary_emb.inv_freq": names[NORM]},
    ],
    ids=["./", "././", "forgotten", "in another shard", "rotary table"],
)
def test_indexes_as_people_have_them(sharded: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    write_index(sharded, change(weight_map(sharded)))
    expect(sharded)


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_an_index_may_name_both_ends_of_a_tied_model(tmp_path: Path, absent: str) -> None:
    """As PyTorch counts them; the shards hold one of the two, under either name."""
    theirs = hf_llama(1, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    both, names = {"lm_head.weight", "model.embed_tokens.weight"}, weight_map(tmp_path)
    (present,) = both - {absent}
    file = names["model.embed_tokens.weight"]
    tensors = load_file(tmp_path / file)
    save_file({present if name in both else name: tensor for name, tensor in tensors.items()}, tmp_path / file)
    write_index(tmp_path, names | dict.fromkeys(both, file))
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits, rtol=0, atol=2e-5)
    write_index(tmp_path, names | dict.fromkeys(both, file) | {"model.extra.weight": file})
    assert "no shard holds: model.extra.weight" in refusal(tmp_path, CheckpointIncompleteError)


def test_an_index_of_the_one_file_is_no_second_checkpoint(tmp_path: Path) -> None:
    """mlx-lm writes it beside model.safetensors."""
    hf_llama(1).save_pretrained(tmp_path)
    write_index(tmp_path, dict.fromkeys(load_file(tmp_path / SINGLE), SINGLE))
    expect(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00001-of-00001.safetensors", "weights.safetensors"])
def test_one_file_of_another_name(tmp_path: Path, name: str) -> None:
    hf_llama(1).save_pretrained(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / name)
    expect(tmp_path)


def test_two_variants_ask_for_one(tmp_path: Path) -> None:
    hf_llama(1).save_pretrained(tmp_path)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).rename(tmp_path / "model.bf16.safetensors")
    (tmp_path / "model.fp16.safetensors").write_bytes(data)
    message = refusal(tmp_path, CheckpointFormatError)
    assert "model.bf16.safetensors and model.fp16.safetensors; give the path of the file to read" in message
    assert open_checkpoint(tmp_path / "model.fp16.safetensors")
