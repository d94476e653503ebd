"""A prefix before every tensor's name, as wrapped models are saved, is left out with a warning."""

import json
import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.checkpoint.families import key_table
from llama_mini.checkpoint.keys import names_in_file
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointMismatchError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

TOKENS = random_tokens(1, 30, vocab_size=96)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Rename = Callable[[str], str]


def write(directory: Path, rename: Rename, how: str = "single", family: str = "llama", tied: bool = False) -> None:
    theirs = random_model(family, 0, tie_word_embeddings=tied)
    theirs.save_pretrained(directory, **({"max_shard_size": "30KB"} if how == "sharded" else {}))
    for file in directory.glob("*.safetensors"):
        tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
        if how == "pickle":
            file.unlink()
            torch.save(tensors, directory / "pytorch_model.bin")
        else:
            save_file(tensors, file)
    if how == "sharded":
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        (directory / INDEX).write_text(json.dumps(index))


def expect(directory: Path, family: str = "llama", tied: bool = False) -> None:
    theirs = random_model(family, 0, tie_word_embeddings=tied)
    torch.testing.assert_close(Llama.from_pretrained(directory)(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)


def before(prefix: str) -> Rename:
    return lambda name: prefix + name


def text_part(name: str) -> str:
    """As transformers 5 names the text part of a multimodal model: the head lies outside."""
    return name if name == "lm_head.weight" else "model.language_model." + name.removeprefix("model.")


PREFIXES = ["_orig_mod.", "module.", "base_model.model.", "language_model.", "transformer.", "model."]
PREFIXES += ["module._orig_mod.", "_orig_mod.module.model."]


@pytest.mark.parametrize(("prefix", "tied"), zip(PREFIXES, cycle([False, True]), strict=False))
def test_what_every_name_begins_with_is_left_out(tmp_path: Path, prefix: str, tied: bool) -> None:
    write(tmp_path, before(prefix), tied=tied)
    with pytest.warns(LlamaMiniWarning, match=f"every tensor's name begins with '{prefix}', which is left out") as got:
        expect(tmp_path, tied=tied)
    assert len(got) == 1


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True), ("olmo2", False)])
@pytest.mark.parametrize("rename", [text_part, lambda name: "module." + text_part(name)])
def test_the_text_part_of_a_multimodal_model(tmp_path: Path, family: str, rename: Rename, tied: bool) -> None:
    write(tmp_path, rename, family=family, tied=tied)
    with pytest.warns(LlamaMiniWarning, match=r"begins with '(module\.)?model\.language_model\.', which"):
        expect(tmp_path, family, tied)


def fsdp(name: str) -> str:
    return "_fsdp_wrapped_module." + re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._orig_mod.", name)


def test_layers_that_are_wrapped_each(tmp_path: Path) -> None:
    write(tmp_path, lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name))
    with pytest.warns(LlamaMiniWarning, match=r"^every layer's names begin with '_orig_mod\.', which is left out"):
        expect(tmp_path)


def test_a_wrapped_model_of_wrapped_layers(tmp_path: Path) -> None:
    write(tmp_path, fsdp, family="qwen3")
    both = r"begins with '_fsdp_\w+\.' and every layer's names begin with '_fsdp_\w+\._orig_mod\.', which"
    with pytest.warns(LlamaMiniWarning, match=both) as warned:
        expect(tmp_path, "qwen3")
    assert len(warned) == 1
    tensors = load_file(tmp_path / SINGLE)
    norm = next(name for name in tensors if name.endswith("1._fsdp_wrapped_module._orig_mod.input_layernorm.weight"))
    tensors[norm.replace("_orig_mod.", "")] = tensors.pop(norm)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.warns(LlamaMiniWarning), pytest.raises(CheckpointMismatchError, match=r"missing: .*unexpected"):
        Llama.from_pretrained(tmp_path)


def test_shards_with_an_index(tmp_path: Path) -> None:
    write(tmp_path, before("_orig_mod."), "sharded")
    with pytest.warns(LlamaMiniWarning, match="every tensor's name begins with '_orig_mod.'"):
        expect(tmp_path)


@pytest.mark.filterwarnings("ignore:.* has no tokenizer")
def test_pickles_of_a_conversion(tmp_path: Path) -> None:
    write(tmp_path / "pickled", before("module."), "pickle")
    with pytest.warns(LlamaMiniWarning, match="every tensor's name begins with 'module.'"):
        convert(tmp_path / "pickled", tmp_path / "converted")
    expect(tmp_path / "converted")


@pytest.mark.parametrize("plain", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.bias"])
def test_one_name_without_it_is_a_mismatch(tmp_path: Path, plain: str) -> None:
    write(tmp_path, lambda name: name if name == plain else "_orig_mod." + name)
    if plain == "lm_head.bias":
        tensors: dict[str, Tensor] = load_file(tmp_path / SINGLE)
        save_file(tensors | {plain: torch.ones(97)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointMismatchError, match=r"missing: .*unexpected: .*_orig_mod\."):
        Llama.from_pretrained(tmp_path)


def test_names_without_a_prefix_keep_their_table() -> None:
    table = key_table("qwen3")
    names = [name.replace("{}", "0") for name in table]
    assert names_in_file(table, names) == table
    assert names_in_file({}, ["tok_embeddings.weight", "norm.weight"]) == {}
    assert names_in_file(table, []) == table
