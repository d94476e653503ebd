"""Tells the kind of a file from its first bytes, never from its name, and opens regular files only."""

import os
import re
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
    """The value is what an error message says about such a file."""

    SAFETENSORS = "a safetensors file"
    GGUF = "a GGUF file: give its path as the model"
    PICKLE = "a PyTorch pickle: convert its directory with `llama-mini convert SRC DST`, since the engine reads none"
    ZIP = "a zip archive: unpack it"
    TAR = "a tar archive, as NeMo's are: unpack it, or convert a .nemo file to Hugging Face's format with NeMo"
    GZIP = "a gzip archive: unpack it"
    ONNX = "an ONNX model, made for another runtime: give the Hugging Face checkpoint that it was made from"
    TFLITE = "a TFLite model, made for another runtime: give the Hugging Face checkpoint that it was made from"
    HDF5 = "an HDF5 file, as TensorFlow saves weights: give those of PyTorch or safetensors"
    NUMPY = "a NumPy array: give a directory, a GGUF file or a safetensors file"
    GGML = "a file in GGML's old format, before GGUF: download the model as GGUF"
    JSON = "JSON text: give the directory that it lies in"
    LFS_POINTER = "a Git LFS pointer: run `git lfs pull`"
    HTML = "an HTML page, probably an error page of a download: download the file again"
    EMPTY = "empty: download it again"
    OTHER = "of an unknown kind: give a directory, a GGUF file or a safetensors file"


_MAGIC = (  # kind, where, bytes there
    (FileKind.TAR, 257, b"ustar"),
    (FileKind.GZIP, 0, b"\x1f\x8b"),
    (FileKind.TFLITE, 4, b"TFL3"),
    (FileKind.HDF5, 0, b"\x89HDF\r\n"),
    (FileKind.NUMPY, 0, b"\x93NUMPY"),
    (FileKind.GGML, 0, (b"lmgg", b"fmgg", b"tjgg", b"algg")),  # ggml, ggmf, ggjt and ggla, little-endian
)
_ONNX = re.compile(rb"\x08[\x03-\x20]\x12.[\w .-]", re.DOTALL)  # its version, then the name of its producer


def describe(kind: FileKind) -> str:
    """What such a file is, to follow "it is", and what to do about it."""
    return kind.value


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
        return FileKind.PICKLE if b"/data.pkl" in head else FileKind.ZIP
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return FileKind.PICKLE
    for kind, begin, magic in _MAGIC:
        if head[begin:].startswith(magic):
            return kind
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return FileKind.LFS_POINTER
    if _ONNX.match(head):
        return FileKind.ONNX
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
