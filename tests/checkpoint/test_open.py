"""Whatever a path holds is told by content; what is no checkpoint is one sentence, from the command line too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.engine.llm import LLM
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import CheckpointError, CheckpointFormatError, CheckpointPathError
from llama_mini.generate import main
from llama_mini.model.llama import Llama
from tests.checkpoint.gguf.gguf_files import write_family
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

TOKENS = random_tokens(1, 30)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    random_model("llama", 0).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return tmp_path / "sharded"


def expect_the_same(path: Path) -> None:
    torch.testing.assert_close(
        Llama.from_pretrained(path)(TOKENS), logits(random_model("llama", 0), TOKENS), rtol=0, atol=2e-5
    )


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    expect_the_same(sharded)
    first, *_ = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointError, match=rf"missing 1 of \d+ shards: {first.name}"):
        open_checkpoint(sharded)


def test_shards_of_two_checkpoints_are_not_mixed(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / "other-00001-of-00002.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"shards of two checkpoints, .* and no index"):
        open_checkpoint(sharded)


def test_files_of_any_other_name(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    for i, file in enumerate(sorted(sharded.glob("*.safetensors"))):
        file.rename(sharded / f"weights.{i:02}.safetensors")
    expect_the_same(sharded)


def test_a_safetensors_file_beside_its_config(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "of any name")
    expect_the_same(tmp_path / "of any name")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointFormatError, match=r"holds only weights; put the config\.json .* beside it"):
        open_checkpoint(tmp_path / "of any name")


def test_a_model_saved_without_its_head_class(tmp_path: Path) -> None:
    theirs = random_model("llama", 0, tie_word_embeddings=True)
    theirs.model.save_pretrained(tmp_path)
    assert "layers.0.input_layernorm.weight" in open_checkpoint(tmp_path).tensors
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)


def test_a_gguf_file_of_any_name_and_a_directory_that_holds_one(tmp_path: Path) -> None:
    theirs = random_model("llama", 0)
    expect_the_same(write_family(tmp_path / "model.safetensors", theirs))
    expect_the_same(tmp_path)
    write_family(tmp_path / "second", theirs)
    with pytest.raises(CheckpointPathError, match=r"holds 2 GGUF files; give one of them: model\.safetensors, second"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "it is an HTML page"),
        (b"PK\x03\x04" + b"\0" * 60, "it is an archive"),
        (b"\x80\x02}q\x00.", "it is a PyTorch pickle: convert its directory with"),
        (b"{}", "it is JSON text"),
        (b"\x7fELF" + b"\0" * 60, "it is of an unknown kind"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=what):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointPathError, match="it is a pipe"):
        open_checkpoint(tmp_path / "pipe")


def test_the_engine_does_not_import_what_reads_pickles() -> None:
    look = "import sys, llama_mini.engine.llm; sys.exit('llama_mini.checkpoint.meta.pickles' in sys.modules)"
    subprocess.run([sys.executable, "-c", look], check=True)


def test_what_is_on_disk_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setattr("llama_mini.checkpoint.hf.hub.fetch_from_hub", lambda name, _: Path("fetched") / name)
    assert resolve("org/other@v1") == Path("fetched/org/other@v1")
    assert resolve("no/such/path") == Path("no/such/path")
    assert resolve(Path("org/other")) == Path("org/other")  # a Path means a path


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "whole")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "whole" / name, linked / name)
    expect_the_same(linked)
    for name in ("model.safetensors", "config.json"):
        content = (linked / name).read_bytes()
        (linked / name).unlink()
        (linked / name).symlink_to(tmp_path / "whole" / name)
        with pytest.raises(CheckpointPathError, match=name):
            open_checkpoint(linked)
        (linked / name).unlink()
        (linked / name).write_bytes(content)


def test_the_hub_caches_own_links_are_followed(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "whole")
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(tmp_path / "whole" / name, home / "blobs" / f"{i:040}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"{i:040}")
    expect_the_same(snapshot)


def test_a_renamed_or_read_only_directory_answers_the_same(tmp_path: Path, tiny_dir: Path) -> None:
    answers = [LLM(tiny_dir, dtype="float32").generate([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))]
    shutil.copytree(tiny_dir, tmp_path / "gpt2-7B.gguf")
    (tmp_path / "gpt2-7B.gguf").chmod(0o500)
    copy = LLM(tmp_path / "gpt2-7B.gguf", dtype="float32")
    answers.append(copy.generate([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True)))
    assert answers[0][0].token_ids == answers[1][0].token_ids


@pytest.mark.parametrize("name", ["absent", "org/na me", "org/name/more", "../absent"])
def test_the_command_line_says_what_a_path_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["--model", name, "Hello"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (3, "")
    assert captured.err.startswith(f"error: {name} does not exist; give ")
    assert captured.err.count("\n") == 1
