"""Tells the kind of a file from its first bytes, never from its name, and opens regular files only."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from llama_mini.errors import CheckpointPathError
from llama_mini.validate import short_repr

HEAD = 512  # bytes, enough to tell the kind
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_NOT_FILES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class FileKind(Enum):
    """The value says what such a file is, to follow "it is", and what to do about it."""

    SAFETENSORS = "a safetensors file"
    GGUF = "a GGUF file: give its path as the model"
    PICKLE = "a PyTorch pickle: convert its directory with `llama-mini convert SRC DST`, since the engine reads none"
    ARCHIVE = "an archive: unpack it"
    GGML = "a file in GGML's old format, before GGUF: download the model as GGUF"
    JSON = "JSON text: give the directory that it lies in"
    LFS_POINTER = "a Git LFS pointer: run `git lfs pull`"
    HTML = "an HTML page, probably an error page of a download: download the file again"
    EMPTY = "empty: download it again"
    OTHER = "of an unknown kind: give a directory, a GGUF file or a safetensors file"


def file_kind(path: Path) -> FileKind:
    """The kind of a file. Raises CheckpointPathError if there is no file, or it cannot be read."""
    with open_file(path) as file:
        return kind_of(file.read(HEAD), size_of(file))


def kind_of(head: bytes, size: int) -> FileKind:
    """The kind of a file of `size` bytes that begins with `head`."""
    if not size:
        return FileKind.EMPTY
    # Before other magic numbers, since a header's length may look like one: a zip's is 67,324,752.
    length = int.from_bytes(head[:8], "little")
    if length <= min(size - 8, MAX_SAFETENSORS_HEADER) and head[8:].startswith((b"{", b" ", b"\t", b"\r", b"\n")):
        return FileKind.SAFETENSORS
    if head.startswith(b"GGUF"):
        return FileKind.GGUF
    if head.startswith(b"PK\x03\x04"):
        return FileKind.PICKLE if b"/data.pkl" in head else FileKind.ARCHIVE
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return FileKind.PICKLE
    if head.startswith(b"\x1f\x8b") or head[257:].startswith(b"ustar"):  # gzip, tar
        return FileKind.ARCHIVE
    if head.startswith((b"lmgg", b"fmgg", b"tjgg")):  # ggml, ggmf and ggjt as little-endian numbers
        return FileKind.GGML
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return FileKind.LFS_POINTER
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return FileKind.HTML
    return FileKind.JSON if text.startswith((b"{", b"[")) else FileKind.OTHER


def size_of(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The open file. Raises CheckpointPathError if it is not a regular file, or a read fails while it is open."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError as error:
        raise CheckpointPathError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # NUL, or half a surrogate pair
        raise CheckpointPathError(f"cannot read {short_repr(str(path))}: no file can have that name") from None
    try:
        if kind != stat.S_IFREG:  # opening a pipe waits for a writer, reading a device may never end
            raise CheckpointPathError(f"cannot read {path}: it is {_NOT_FILES.get(kind, 'no file')}; give a file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointPathError(f"cannot read {path}: {error.strerror}") from None
