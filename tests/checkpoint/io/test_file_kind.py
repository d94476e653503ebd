"""What a file is, told by its content: every kind that turns up under another name, and nothing that would hang."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llama_mini.checkpoint.io.file_kind import FileKind, file_kind, kind_of
from llama_mini.errors import CheckpointPathError

NOBODY = 65534


def torch_zip(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def torch_legacy(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


def other_zip(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weight=np.zeros(3))


def empty_safetensors(path: Path) -> None:
    save_file({}, path)


def safetensors_like_zip(path: Path) -> None:
    """The length of its header reads as a zip's first four bytes."""
    with path.open("wb") as file:
        file.write(b"PK\x03\x04\0\0\0\0{")
        file.truncate(8 + int.from_bytes(b"PK\x03\x04", "little"))


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (lambda path: save_file({"weight": torch.zeros(3)}, path), FileKind.SAFETENSORS),
        (empty_safetensors, FileKind.SAFETENSORS),
        (safetensors_like_zip, FileKind.SAFETENSORS),
        (torch_zip, FileKind.PICKLE),
        (torch_legacy, FileKind.PICKLE),
        (other_zip, FileKind.ARCHIVE),
    ],
)
def test_what_a_library_wrote_is_known(tmp_path: Path, write: Callable[[Path], None], kind: FileKind) -> None:
    path = tmp_path / "model.gguf"  # the name says nothing
    write(path)
    assert file_kind(path) is kind


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", FileKind.EMPTY),
        (b"GGUF\x03\0\0\0", FileKind.GGUF),
        (b'{"a": 1}', FileKind.JSON),
        (b"\xef\xbb\xbf\n  [1]", FileKind.JSON),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", FileKind.LFS_POINTER),
        (b"<!DOCTYPE html><html></html>", FileKind.HTML),
        (b"\n\n<HTML>", FileKind.HTML),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', FileKind.HTML),
        (b"Entry not found", FileKind.OTHER),
        (b"\x80", FileKind.OTHER),
        (bytes(8), FileKind.OTHER),
        (bytes(1000), FileKind.OTHER),
        (b"\x10\0\0\0\0\0\0\0{}", FileKind.OTHER),  # a header longer than the file
    ],
)
def test_a_kind_is_told_by_the_first_bytes(tmp_path: Path, content: bytes, kind: FileKind) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert file_kind(path) is kind


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2**63))
def test_any_bytes_have_a_kind(head: bytes, more: int) -> None:
    assert len(kind_of(head, len(head) + more).value) < 120


def test_no_more_than_the_head_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(2**40)  # a hole: it takes no room on the disk
    assert file_kind(path) is FileKind.GGUF


def test_the_phrases_say_what_to_do() -> None:
    phrases = [kind.value for kind in FileKind]
    assert len(set(phrases)) == len(FileKind)
    assert "git lfs pull" in FileKind.LFS_POINTER.value
    assert "llama-mini convert SRC DST" in FileKind.PICKLE.value


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pipe, "it is a pipe"),
        (lambda path: path.mkdir(), "it is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.symlink_to("absent"), "No such file or directory"),
        (lambda path: None, "No such file or directory"),
        (loop, "symbolic links"),
        (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
    ],
    ids=["pipe", "directory", "device", "dangling", "absent", "loop", "fails when read"],
)
def test_what_is_no_file_is_refused_and_nothing_hangs(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointPathError, match=f"cannot read {path}: .*{reason}"):
        file_kind(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300])
def test_a_name_that_no_file_has_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointPathError, match="cannot read") as caught:
        file_kind(tmp_path / name)
    str(caught.value).encode()


def test_a_file_that_must_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"GGUF")
    path.chmod(0)
    root = os.geteuid() == 0
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    if root:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(CheckpointPathError, match=f"cannot read {path}: Permission denied"):
            file_kind(path)
    finally:
        if root:
            os.seteuid(0)
