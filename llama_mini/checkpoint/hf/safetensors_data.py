"""Reads safetensors in chunks of rows, straight into their final memory, and writes them one tensor at a time.

The library does neither. It allocates each tensor that it reads, so a model would be in memory twice while it loads.
To save, it needs all tensors in memory at once. Two threads read as fast as the page cache delivers.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

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

_AHEAD = 2  # chunks of rows that are read while the caller uses the one before; only one if they are whole tensors
Item = TypeVar("Item")
_NAMES = {dtype: name for name, dtype in WEIGHTS.items()}


def read_rows(
    tensors: Iterable[SafetensorsTensor],
    rows_per_chunk: Callable[[int], int] | None = None,
    destination: Destination = no_destination,
) -> Iterator[tuple[SafetensorsTensor, int, Tensor]]:
    """Yields (tensor, first row, rows): each tensor once, file by file, in the order of the data.

    rows_per_chunk: columns of a matrix -> rows to read at once; None reads whole tensors.
    destination: rows are read into the memory that it returns, if that is contiguous and has the file's dtype.

    Raises CheckpointFormatError if a file changed since its header was read, or a tensor is not of a weight dtype.
    """
    by_file: dict[Path, list[SafetensorsTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for path, in_file in by_file.items():
        dtypes = {tensor: weight_dtype(tensor) for tensor in sorted(in_file, key=position)}
        ahead = 1 if rows_per_chunk is None else _AHEAD
        try:
            with ThreadPoolExecutor(ahead) as pool:
                chunks = _chunks(dtypes, rows_per_chunk, destination)
                reads = ((*chunk, pool.submit(_fill, path, *chunk[2:])) for chunk in chunks)
                for tensor, first, rows, _, reading in _look_ahead(reads, ahead):
                    reading.result()
                    if stamp_of(path.stat()) != tensor.stamp:
                        raise changed(path)
                    yield tensor, first, rows
                    del rows, reading  # before the next ones are made
        except OSError:
            raise changed(path) from None


def _chunks(
    dtypes: Mapping[SafetensorsTensor, torch.dtype],
    rows_per_chunk: Callable[[int], int] | None,
    destination: Destination,
) -> Iterator[tuple[SafetensorsTensor, int, Tensor, int]]:
    """Yields tensor, index of the first row, memory for the rows, and the byte of the file where they begin."""
    for tensor, dtype in dtypes.items():
        shape, begin = tensor.shape, tensor.begin
        n_rows = shape[0] if shape else 1
        n = n_rows if rows_per_chunk is None or len(shape) != 2 else rows_per_chunk(shape[1])
        for first in range(0, max(n_rows, 1), max(n, 1)):  # a tensor without rows is one chunk
            chunk_shape = (min(n, n_rows - first), *shape[1:]) if shape else ()
            rows = destination(tensor.name, first, chunk_shape)
            if rows is None or rows.dtype != dtype or not (rows.is_cpu and rows.is_contiguous()):
                rows = torch.empty(chunk_shape, dtype=dtype)
            yield tensor, first, rows, begin
            begin += rows.nbytes
            del rows


def _look_ahead(items: Iterator[Item], n: int) -> Iterator[Item]:
    """The same items, each yielded after the next n were made: those are read meanwhile."""
    pending = deque[Item]()
    for item in items:
        pending.append(item)
        del item
        if len(pending) > n:
            yield pending.popleft()
    while pending:
        yield pending.popleft()


def _fill(path: Path, rows: Tensor, begin: int) -> None:
    """Fills `rows` from byte `begin` of the file. Raises OSError if the file ends before that."""
    memory = rows.view(-1).view(torch.uint8).numpy().data
    # No memory map: if the file were cut later, the process would be killed; if edited, the weights would change.
    with path.open("rb", 0) as file:
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
    """Writes the header, then `tensors` in the order of `entries`, with only one in memory at a time.

    Call it within `new_directory`: an error leaves half a file.

    Raises:
        CheckpointPathError: the file cannot be written.
        ValueError: `tensors` do not match `entries`.
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
                    actual = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                    raise ValueError(f"{name} was announced as {dtype} of shape {tuple(shape)}, but is {actual}")
                file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
                del tensor  # before the next one is made
            if next(tensors, None) is not None:
                raise ValueError(f"there are more tensors than the {len(entries)} that were announced")
    except OSError as error:
        raise CheckpointPathError(
            f"cannot write {path}: {error.strerror}; make room for {n_bytes} bytes or give another path"
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
