"""Reading safetensors by rows, straight into the memory where they stay, and writing them one tensor at a time.

The library does neither: it allocates each tensor that it reads, so that a model would be in memory twice while it
loads, and to save it wants all tensors in memory at once. Two threads read as fast as the page cache gives.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_mini.checkpoint.hf.safetensors_header import (
    METADATA,
    WEIGHTS,
    SafetensorsTensor,
    changed,
    position,
    stamp_of,
    weight_dtype,
)
from llama_mini.checkpoint.source import Destination, no_destination
from llama_mini.errors import CheckpointPathError

_BATCH = (
    1 << 21
)  # bytes that are read while the batch before is used: handing less to a thread costs more than it saves
_PIECE = 1 << 20  # bytes that a thread reads before it takes more
_NAMES = {dtype: name for name, dtype in WEIGHTS.items()}


class _Rows(NamedTuple):
    """Rows of a tensor that are being read: `first` is the index of the first, `begin` its byte in the file."""

    tensor: SafetensorsTensor
    first: int
    rows: Tensor
    begin: int


def read_rows(
    tensors: Iterable[SafetensorsTensor],
    rows_per_chunk: Callable[[int], int] | None = None,
    destination: Destination = no_destination,
) -> Iterator[tuple[SafetensorsTensor, int, Tensor]]:
    """The weights that `read_header` found, each once, file after file in the order of the data.

    rows_per_chunk: how many rows of a matrix of so many columns come at once; None gives whole tensors.
    destination: rows are read into the memory that it gives where that has the file's dtype and is contiguous.

    Raises CheckpointFormatError if a file is not what it was when its header was read, or holds other than weights.
    """
    by_file: dict[Path, list[SafetensorsTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for path, wanted in by_file.items():
        dtypes = {tensor: weight_dtype(tensor) for tensor in sorted(wanted, key=position)}
        try:
            # Not mapped into memory: a file that is cut later would kill the process, and an edit change weights.
            with path.open("rb", 0) as file, path.open("rb", 0) as second, ThreadPoolExecutor(1) as helper:
                batch = deque[_Rows]()
                for next_batch in chain(_batches(dtypes, rows_per_chunk, destination), [deque[_Rows]()]):
                    # The helper reads the next batch while the caller uses this one; then this thread joins in.
                    pieces = deque(piece for each in next_batch for piece in _pieces(each.begin, each.rows))
                    reading = helper.submit(_fill, second, pieces)
                    while batch:
                        tensor, first, rows, _ = batch.popleft()
                        if stamp_of(path.stat()) != tensor.stamp:
                            raise changed(path)
                        yield tensor, first, rows
                        del rows  # before the next ones are made
                    _fill(file, pieces)
                    reading.result()
                    batch = next_batch
        except OSError:
            raise changed(path) from None


def _batches(
    dtypes: Mapping[SafetensorsTensor, torch.dtype],
    rows_per_chunk: Callable[[int], int] | None,
    destination: Destination,
) -> Iterator[deque[_Rows]]:
    batch, n_bytes = deque[_Rows](), 0
    for tensor, dtype in dtypes.items():
        begin = tensor.begin
        for first, shape in _chunks(tensor.shape, rows_per_chunk):
            rows = destination(tensor.name, first, shape)
            if rows is None or rows.dtype != dtype or not (rows.is_cpu and rows.is_contiguous()):
                rows = torch.empty(shape, dtype=dtype)
            batch.append(_Rows(tensor, first, rows, begin))
            begin += rows.nbytes
            n_bytes += rows.nbytes
            del rows
            if n_bytes >= _BATCH:
                yield batch
                batch, n_bytes = deque(), 0
    yield batch


def _chunks(shape: tuple[int, ...], rows_per_chunk: Callable[[int], int] | None) -> list[tuple[int, tuple[int, ...]]]:
    """The index of the first row, and the shape, of each chunk of a matrix; any other tensor is one chunk."""
    if rows_per_chunk is None or len(shape) != 2 or shape[0] <= (n := rows_per_chunk(shape[1])):
        return [(0, shape)]
    return [(first, (min(n, shape[0] - first), shape[1])) for first in range(0, shape[0], n)]


def _pieces(begin: int, rows: Tensor) -> Iterator[tuple[int, memoryview]]:
    memory = rows.view(-1).view(torch.uint8).numpy().data
    return ((begin + at, memory[at : at + _PIECE]) for at in range(0, len(memory), _PIECE))


def _fill(file: FileIO, pieces: deque[tuple[int, memoryview]]) -> None:
    """Reads pieces until none is left; other threads take some of them. Raises OSError where the file ends."""
    while True:
        try:
            begin, memory = pieces.popleft()
        except IndexError:
            return
        file.seek(begin)
        while memory:
            if not (n := file.readinto(memory)):
                raise OSError("the file is cut")
            memory = memory[n:]


def write_file(
    path: Path,
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes the header, then one tensor at a time, so that memory holds no more than one; `tensors` in their order.

    Write within `new_directory`: what is left after a fault is half a file.

    Raises:
        CheckpointPathError: the disk does not take it.
        ValueError: `tensors` are not those of `entries`.
    """
    entries = list(entries)
    header = _header_bytes(entries, metadata)
    n_bytes = len(header) + sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries)
    try:
        with path.open("wb") as file:
            file.write(header)
            for name, dtype, shape in entries:
                tensor = next(tensors, None)
                if tensor is None:
                    raise ValueError(f"{name} was announced, but there is no further tensor to write")
                if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
                    found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                    raise ValueError(f"{name} was announced as {dtype} of shape {tuple(shape)}, but is {found}")
                file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
                del tensor  # before the next one is made
            if next(tensors, None) is not None:
                raise ValueError(f"there are more tensors than the {len(entries)} that were announced")
    except OSError as error:
        raise CheckpointPathError(
            f"cannot write {path}: {error.strerror}; make room for {n_bytes} bytes or name another place"
        ) from None


def _header_bytes(entries: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name, dtype, shape in entries:
        if name in header:
            raise ValueError(f"the name {name} is announced twice or is reserved")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
