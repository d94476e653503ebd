"""tie_word_embeddings is true, but the file has a head: one that differs is used and warned of, as in transformers."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_mini.checkpoint.hf import safetensors_data
from llama_mini.checkpoint.hf.safetensors_data import read_rows
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.weight_formats import weight_bytes
from llama_mini.cli.convert import convert
from llama_mini.cli.info import describe
from llama_mini.engine.llm import LLM
from llama_mini.errors import CheckpointMismatchError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from tests.checkpoint.gguf.gguf_files import write_family
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

TOKENS = random_tokens(1, 30, vocab_size=96)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OTHER = r"lm_head\.weight differs from the embedding, so it is used, although tie_word_embeddings is true"
Change = Callable[[Tensor], Tensor]


def write(directory: Path, change: Change, how: str = "single", family: str = "llama") -> Path:
    """A tied checkpoint that also has a head: what `change` makes of the embedding."""
    random_model(family, 0, tie_word_embeddings=True).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[HEAD] = change(tensors[EMBEDDING]).clone()
    (directory / "model.safetensors").unlink()
    if how == "single":
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    elif how == "pickle":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        files = {name: f"model-0000{1 + (name == HEAD)}-of-00002.safetensors" for name in tensors}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, directory / file, {"format": "pt"})
        index = {"metadata": {"total_size": 7}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def last_row(embedding: Tensor) -> Tensor:
    """Differs in one element at the very end."""
    head = embedding.clone()
    head[-1, -1] += 0.5
    return head


def other(embedding: Tensor) -> Tensor:
    return embedding.flip(0) * 0.5


def expect(path: Path, directory: Path, **how: Any) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    torch.testing.assert_close(Llama.from_pretrained(path, **how)(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", ["single", "sharded"])
@pytest.mark.parametrize("change", [last_row, other])
def test_another_head_is_used_as_in_transformers(tmp_path: Path, how: str, change: Change) -> None:
    directory = write(tmp_path / "tied", change, how)
    with pytest.warns(LlamaMiniWarning, match=OTHER) as warned:
        model = Llama.from_pretrained(directory)
    assert len(warned) == 1
    assert model.lm_head is not None
    with pytest.warns(LlamaMiniWarning):
        expect(directory, directory)
    model.save_pretrained(tmp_path / "saved")  # says what it is: both read it without a warning
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    expect(tmp_path / "saved", directory)


@pytest.mark.parametrize("how", ["single", "sharded"])
def test_an_equal_head_is_left_out_in_silence(tmp_path: Path, how: str) -> None:
    directory = write(tmp_path, lambda embedding: embedding, how)
    source, model = open_checkpoint(directory), Llama.from_pretrained(directory)
    assert model.lm_head is None
    assert weight_bytes(source, model.dtype, "none") == sum(p.nbytes for p in model.parameters())
    expect(directory, directory)


def test_a_head_of_another_dtype_or_shape(tmp_path: Path) -> None:
    """A head in bfloat16 equals an embedding in float32 only if that has no further bits."""
    directory = write(tmp_path / "dtype", lambda embedding: embedding.bfloat16())
    with pytest.warns(LlamaMiniWarning, match=OTHER):
        assert Llama.from_pretrained(directory, "bfloat16").lm_head is not None
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {EMBEDDING: tensors[HEAD].float()}, directory / "model.safetensors")
    assert Llama.from_pretrained(directory).lm_head is None
    shape = write(tmp_path / "shape", lambda embedding: embedding[:-1])
    with (
        pytest.warns(LlamaMiniWarning, match=OTHER),
        pytest.raises(CheckpointMismatchError, match=r"1 misshaped: lm_head\.weight is \(96, "),
    ):
        Llama.from_pretrained(shape)


@pytest.mark.filterwarnings("ignore:.* has no tokenizer")
def test_a_conversion_writes_an_untied_model(tmp_path: Path) -> None:
    pickled = write(tmp_path / "pickled", other, "pickle")
    with pytest.warns(LlamaMiniWarning, match=OTHER):
        convert(pickled, tmp_path / "converted")
    expect(tmp_path / "converted", pickled)
    assert HEAD in load_file(tmp_path / "converted" / "model.safetensors")
    convert(write(tmp_path / "equal", lambda embedding: embedding, "pickle"), tmp_path / "tied")
    assert HEAD not in load_file(tmp_path / "tied" / "model.safetensors")


@pytest.mark.parametrize("how", [{"kernels": "off"}, {}, {"quantize": "int8"}, {"quantize": "int4"}])
def test_fast_paths_and_info_have_the_same_head(tmp_path: Path, tiny_dir: Path, how: dict[str, str]) -> None:
    tied = shutil.copytree(tiny_dir, tmp_path / "tied")
    raw = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.warns(LlamaMiniWarning, match=OTHER):
        scores = LLM(tied, dtype="float32", **how).score([1, 2, 3, 4])
    assert scores == LLM(tiny_dir, dtype="float32", **how).score([1, 2, 3, 4])
    with pytest.warns(LlamaMiniWarning, match=OTHER):
        facts = [describe(path).rpartition("; ")[0].splitlines() for path in (tied, tiny_dir)]  # not the free memory
    assert facts[0][2:] == facts[1][2:]


def test_a_gguf_file_says_it_by_its_tensors(tmp_path: Path) -> None:
    theirs = random_model("llama", 0, tie_word_embeddings=False)
    assert Llama.from_pretrained(write_family(tmp_path / "two", theirs)).lm_head is not None


def test_only_equal_heads_are_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[Tensor] = []

    def counted(*args: Any) -> Iterator[tuple[Any, int, Tensor]]:
        for chunk in read_rows(*args):
            chunks.append(chunk[2])
            yield chunk

    monkeypatch.setattr(safetensors_data, "read_rows", counted)
    monkeypatch.setattr(safetensors_data, "rows_per_chunk", lambda _: 16)
    open_checkpoint(write(tmp_path / "equal", lambda embedding: embedding))
    assert [len(rows) for rows in chunks] == 2 * 6 * [16] + 2 * [1]
    chunks.clear()
    with pytest.warns(LlamaMiniWarning, match=OTHER):
        open_checkpoint(write(tmp_path / "other", other))
    assert len(chunks) == 2
