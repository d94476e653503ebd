"""The header of a safetensors file. The `safetensors` library checks it, then this file reads where each tensor lies.

Reading some rows of a tensor needs the byte where it begins, which the library does not tell. Of two tensors with one
name, the library silently keeps the last; here they are an error.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from llama_mini.checkpoint.io.file_kind import HEAD, FileKind, kind_of, open_file, size_of
from llama_mini.errors import CheckpointFormatError
from llama_mini.validate import short_repr

WEIGHTS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
METADATA = "__metadata__"
Stamp = tuple[int, ...]


class SafetensorsTensor(NamedTuple):
    """One tensor of a file: `dtype` as the file names it ("BF16"), `begin` and `end` in bytes from the file's start.

    `stamp` is the file's `stamp_of` when the header was read.
    """

    name: str
    file: Path
    stamp: Stamp
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


Tensors = Mapping[str, SafetensorsTensor]  # of a checkpoint, by name


def read_header(path: Path) -> dict[str, SafetensorsTensor]:
    """Every tensor by name, in the order of the data. The data are not read, but checked to fill the file exactly.

    Raises:
        CheckpointPathError: there is no such file, or it cannot be read.
        CheckpointFormatError: the file is not a safetensors file or is broken; names the file and the fault.
    """
    with open_file(path) as file:
        stamp = stamp_of(os.fstat(file.fileno()))
        kind = kind_of(file.read(HEAD), size_of(file))
        if kind not in (FileKind.SAFETENSORS, FileKind.OTHER):
            raise CheckpointFormatError(f"{path} is not a safetensors file but {kind.value}")
        try:
            # Reads no data, maps nothing, and allocates no more than the file's size.
            with safe_open(path, framework="pt", backend="pread"):
                pass
        except SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise _fault(path, f"the safetensors library refuses it ({reason:.200}); download it again") from None
        file.seek(0)
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(start - 8)
    if stamp_of(path.stat()) != stamp:
        raise changed(path)
    header = _unique_names(path, text)
    header.pop(METADATA, None)
    if not header:
        raise _fault(path, "it holds no tensors; download it again")
    tensors = [_tensor(path, stamp, start, *item) for item in header.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=position)}


def cut_rows(tensor: SafetensorsTensor, name: str, first: int, n: int) -> SafetensorsTensor:
    """Some rows of a tensor, under another name."""
    row = (tensor.end - tensor.begin) // tensor.shape[0]
    begin = tensor.begin + first * row
    return tensor._replace(name=name, shape=(n, *tensor.shape[1:]), begin=begin, end=begin + n * row)


def position(tensor: SafetensorsTensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


def stamp_of(status: os.stat_result) -> Stamp:
    """Changes when the file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def weight_dtype(tensor: SafetensorsTensor) -> torch.dtype:
    """The torch dtype. Raises CheckpointFormatError, which names the tensor, for a dtype that weights cannot have."""
    if tensor.dtype in WEIGHTS:
        return WEIGHTS[tensor.dtype]
    if tensor.dtype.startswith("F"):
        what = f"is quantised to {tensor.dtype[1]} bits"
    else:
        what = {"BOOL": "holds truth values", "C64": "holds complex numbers"}.get(tensor.dtype, "holds integers")
    known = f"{', '.join(WEIGHTS)}; give a checkpoint in one of these"
    raise _fault(tensor.file, f"tensor {short_repr(tensor.name)} {what} ({tensor.dtype}), but weights must be {known}")


def changed(path: Path) -> CheckpointFormatError:
    return _fault(path, "it changed while it was read; load it again")


def _unique_names(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(entries := dict(pairs)) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _fault(path, f"its header holds the name {short_repr(name)} twice; download it again")
        return entries

    return json.loads(text, object_pairs_hook=unique, parse_float=str)


def _tensor(path: Path, stamp: Stamp, start: int, name: str, entry: Any) -> SafetensorsTensor:
    if not isinstance(entry, dict) or not isinstance(entry["dtype"], str):  # the library accepts a list and a map
        what = f"tensor {short_repr(name)} must have dtype, shape and data_offsets, but is {short_repr(entry)}"
        raise _fault(path, f"{what}; download it again")
    begin, end = entry["data_offsets"]
    return SafetensorsTensor(name, path, stamp, tuple(entry["shape"]), entry["dtype"], start + begin, start + end)


def _fault(path: Path, sentence: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path}: {sentence}")
