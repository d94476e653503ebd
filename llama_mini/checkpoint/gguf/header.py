"""The header of a GGUF file. Every count, length and offset in it is checked against the file's size before use.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` library's reader maps the whole file
into memory, takes two seconds, and trusts the counts in the header.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llama_mini.checkpoint.io.file_kind import open_file, size_of
from llama_mini.errors import CheckpointFormatError
from llama_mini.validate import short_repr

_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(map(np.dtype, ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))))
_SCALARS |= {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
_MAX_ARRAY_DEPTH = 4
_MAX_DIMENSIONS = 4
# The common part of `_ggml_types`, which saves the import of `gguf`.
_USUAL_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20)}
_USUAL_TYPES |= {6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)}
_USUAL_TYPES |= {12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210)}
_MIN_ENTRY_BYTES = 8 + 4 + 1  # a key's length, a value's type, a value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # a name's length, a count of dimensions, one dimension, a type, an offset


class GGUFTensor(NamedTuple):
    """One tensor of a GGUF file: `shape` in NumPy's order (the file has it reversed), `type` as ggml names it ("Q4_1"),
    `offset` and `n_bytes` of its data from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Everything in a GGUF file except the tensors' data.

    `metadata` holds Python scalars and strings, NumPy arrays of numbers, and lists of strings or arrays.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """The header of a little-endian GGUF file of version 2 or 3.

    Raises:
        CheckpointPathError: there is no such file, or it cannot be read.
        CheckpointFormatError: the file is not GGUF or is broken; names the file and the fault.
    """
    with open_file(path) as file:
        return _parse(_Bytes(file, path))


class _Bytes:
    """Reads a file from front to back. `what` names the part that is read, for the message if the file is too short."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.size = size_of(file)
        self.position = 0
        self._read: Callable[[int], bytes] = file.read

    def take(self, n: int, what: str) -> bytes:
        self.check(n, what)
        data = self._read(n)
        if len(data) != n:  # the file has shrunk meanwhile
            raise self.fault(f"the file ends inside {what}; download it again")
        self.position += n
        return data

    def check(self, n: int, what: str) -> None:
        remaining = self.size - self.position
        if n > remaining:
            raise self.fault(f"{what} needs {n} bytes, but the file has {remaining} left; it is cut short or broken")

    def number(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "little")

    def count(self, min_bytes: int, what: str) -> int:
        """A count of items of at least `min_bytes` each. Refuses more than the file can hold."""
        n = self.number(8, f"the count of {what}")
        self.check(n * min_bytes, f"{n} {what}")
        return n

    def text(self, what: str) -> str:
        try:
            return self.take(self.number(8, f"the length of {what}"), what).decode()
        except UnicodeDecodeError:
            raise self.fault(f"{what} is not UTF-8") from None

    def texts(self, n: int, what: str) -> list[str]:
        """The next n strings. A vocabulary has a hundred thousand, so this loop avoids calls of `text`."""
        strings, read, remaining = list[str](), self._read, self.size - self.position
        for _ in range(n):
            length = int.from_bytes(read(8), "little")
            remaining -= 8
            data = read(length) if length <= remaining else b""
            if len(data) != length:
                self.position = self.size - max(remaining, 0)
                self.take(length, what)
            remaining -= length
            try:
                strings.append(data.decode())
            except UnicodeDecodeError:
                raise self.fault(f"{what} is not UTF-8") from None
        self.position = self.size - remaining
        return strings

    def fault(self, sentence: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{self.path}: {sentence}")


def _parse(file: _Bytes) -> GGUFHeader:
    version = _read_version(file)
    n_tensors = file.count(_MIN_TENSOR_BYTES, "tensors")
    n_entries = file.count(_MIN_ENTRY_BYTES, "metadata entries")

    metadata: dict[str, Any] = {}
    for i in range(n_entries):
        key = file.text(f"metadata key {i}")
        if key in metadata:
            raise file.fault(f"metadata key {short_repr(key)} occurs twice")
        kind = file.number(4, f"the type of {short_repr(key)}")
        metadata[key] = _read_value(file, kind, f"the value of {short_repr(key)}")

    alignment = _alignment(file, metadata)
    tensors: dict[str, GGUFTensor] = {}
    for i in range(n_tensors):
        info = _read_tensor_info(file, i, alignment)
        if info.name in tensors:
            raise file.fault(f"tensor {short_repr(info.name)} occurs twice")
        tensors[info.name] = info

    start = -(-file.position // alignment) * alignment
    tensors = {name: info._replace(offset=start + info.offset) for name, info in tensors.items()}
    _check_layout(file, tensors)
    return GGUFHeader(file.path, version, metadata, tensors)


def _read_version(file: _Bytes) -> int:
    magic = file.take(min(4, file.size), "the first four bytes")
    if magic != b"GGUF":
        raise file.fault(f"it is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
    version = file.number(4, "the version")
    if version and not version & 0xFFFF:
        raise file.fault("it is big-endian; convert it to little-endian")
    if version not in (2, 3):
        raise file.fault(f"it is GGUF version {version}; versions 2 and 3 can be read")
    return version


def _read_value(file: _Bytes, kind: int, what: str, depth: int = 0) -> Any:
    if kind == _STRING:
        return file.text(what)
    if kind == _ARRAY:
        return _read_array(file, what, depth + 1)
    if kind not in _SCALARS:
        raise file.fault(f"{what} has the unknown type {kind}")
    return _numbers(file, kind, 1, what).item()


def _read_array(file: _Bytes, what: str, depth: int) -> Any:
    if depth > _MAX_ARRAY_DEPTH:
        raise file.fault(f"{what} is nested more than {_MAX_ARRAY_DEPTH} arrays deep")
    kind = file.number(4, f"the element type of {what}")
    if kind in _SCALARS:
        return _numbers(file, kind, file.count(_SCALARS[kind].itemsize, f"elements in {what}"), what)
    n = file.count({_STRING: 8, _ARRAY: 12}.get(kind, 1), f"elements in {what}")
    if kind not in (_STRING, _ARRAY):
        raise file.fault(f"{what} has the unknown element type {kind}")
    return file.texts(n, what) if kind == _STRING else [_read_array(file, what, depth + 1) for _ in range(n)]


def _numbers(file: _Bytes, kind: int, n: int, what: str) -> np.ndarray:
    data = file.take(n * _SCALARS[kind].itemsize, what)
    if _SCALARS[kind] == np.bool_ and data.strip(b"\0\1"):
        raise file.fault(f"{what} is neither true nor false")
    return np.frombuffer(data, _SCALARS[kind])


def _alignment(file: _Bytes, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise file.fault(f"general.alignment must be a power of two, not {short_repr(alignment)}")
    return alignment


def _read_tensor_info(file: _Bytes, i: int, alignment: int) -> GGUFTensor:
    """One entry of the header's list of tensors. Its offset counts from the start of the data."""
    name = file.text(f"the name of tensor {i}")
    what = f"tensor {short_repr(name)}"
    n_dimensions = file.number(4, f"the dimensions of {what}")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise file.fault(f"{what} has {n_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
    shape = tuple(file.number(8, f"the shape of {what}") for _ in range(n_dimensions))[::-1]
    if 0 in shape:
        raise file.fault(f"{what} has the shape {shape}, which has no elements")

    number = file.number(4, f"the type of {what}")
    types = _USUAL_TYPES if number in _USUAL_TYPES else _ggml_types()
    if number not in types:
        raise file.fault(f"{what} has unknown type {number}; known: {', '.join(kind[0] for kind in types.values())}")
    kind, block, block_bytes = types[number]
    if shape[-1] % block:
        raise file.fault(f"{what} has rows of {shape[-1]}, which is not a multiple of {kind}'s block of {block}")

    offset = file.number(8, f"the offset of {what}")
    if offset % alignment:
        raise file.fault(f"{what} lies at offset {offset}, which is not a multiple of the alignment {alignment}")
    return GGUFTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)


def _check_layout(file: _Bytes, tensors: dict[str, GGUFTensor]) -> None:
    """Refuses tensors that overlap or end beyond the end of the file."""
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise file.fault(f"tensors {short_repr(before)} and {short_repr(info.name)} overlap")
        end, before = info.offset + info.n_bytes, info.name
        if end > file.size:
            tensor = f"tensor {short_repr(info.name)}, {info.type} of shape {info.shape}"
            raise file.fault(f"{tensor}, ends at byte {end}, but the file has {file.size}; it is cut short or broken")


@cache
def _ggml_types() -> dict[int, tuple[str, int, int]]:
    """Number of a type -> its name, elements in a block, bytes in a block."""
    from gguf import GGML_QUANT_SIZES  # 100 ms

    return {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
