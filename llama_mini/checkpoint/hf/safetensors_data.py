"""Reads safetensors in chunks of rows, straight into their final memory, and writes them one tensor at a time.

The library does neither. It allocates each tensor that it reads, so a model would be in memory twice while it loads.
To save, it needs all tensors in memory at once. Two threads read as fast as the page cache delivers.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_mini.checkpoint.io.safetensors_header import (
    METADATA,
    WEIGHTS,
    SafetensorsTensor,
    Tensors,
    changed,
    position,
    stamp_of,
    weight_dtype,
)
from llama_mini.checkpoint.source import Destination, ReadRows, Rows, StoredTensor, no_destination, rows_per_chunk
from llama_mini.errors import CheckpointPathError

_AHEAD = 2  # batches that are read while the caller uses the one before; only one if they hold whole tensors
# Bytes that a thread reads at once: handing it each small tensor takes as long as reading that. A chunk of 2^20 numbers
# in bfloat16, in whole rows, has more: it is read by itself.
_BATCH = 3 << 19
Item = TypeVar("Item")
Chunk = tuple[SafetensorsTensor, int, Tensor, int]  # a tensor, its first row here, memory for the rows, their byte
_NAMES = {dtype: name for name, dtype in WEIGHTS.items()}


def stored(tensors: Tensors) -> dict[str, StoredTensor]:
    return {name: StoredTensor(t.file, t.shape, t.dtype, t.end - t.begin) for name, t in tensors.items()}


def reader(tensors: Tensors) -> ReadRows:
    """Reads plain tensors, as `Source.read_rows` does; their rows have the file's dtype."""

    def read(names: Collection[str], _: torch.dtype, destination: Destination, whole: bool) -> Iterator[Rows[Tensor]]:
        selected, at_once = (tensors[name] for name in names), None if whole else rows_per_chunk
        for tensor, first, rows in read_rows(selected, at_once, destination):
            yield tensor.name, first, rows
            del rows  # before the next ones are read

    return read


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
                batches = _batches(_chunks(dtypes, rows_per_chunk, destination))
                reads = ((batch, pool.submit(_fill, path, list(batch))) for batch in batches)
                for batch, reading in _look_ahead(reads, ahead):
                    reading.result()
                    del reading
                    while batch:
                        tensor, first, rows, _ = batch.popleft()
                        if stamp_of(path.stat()) != tensor.stamp:
                            raise changed(path)
                        yield tensor, first, rows
                        del rows  # before the next ones are made
        except OSError:
            raise changed(path) from None


def _chunks(
    dtypes: Mapping[SafetensorsTensor, torch.dtype],
    rows_per_chunk: Callable[[int], int] | None,
    destination: Destination,
) -> Iterator[Chunk]:
    """Every chunk of rows, in the order of the file."""
    for tensor, dtype in dtypes.items():
        shape, begin = tensor.shape, tensor.begin
        n_rows = shape[0] if shape else 1
        n = n_rows if rows_per_chunk is None or len(shape) != 2 else rows_per_chunk(shape[1])
        for first in range(0, max(n_rows, 1), max(n, 1)):  # a tensor without rows is one chunk
            chunk_shape = (min(n, n_rows - first), *shape[1:]) if shape else ()
            rows = destination(tensor.name, first, chunk_shape)
            if rows is None or rows.dtype != dtype or not (rows.is_cpu and rows.is_contiguous()):
                rows = torch.empty(chunk_shape, dtype=dtype, device="cpu")
            yield tensor, first, rows, begin
            begin += rows.nbytes
            del rows


def _batches(chunks: Iterator[Chunk]) -> Iterator[deque[Chunk]]:
    """The chunks in groups of `_BATCH` bytes or more."""
    batch, n_bytes = deque[Chunk](), 0
    for chunk in chunks:
        batch.append(chunk)
        n_bytes += chunk[2].nbytes
        del chunk
        if n_bytes >= _BATCH:
            yield batch
            batch, n_bytes = deque(), 0
    if batch:
        yield batch


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


def _fill(path: Path, chunks: list[Chunk]) -> None:
    """Reads the rows of each chunk. Raises OSError if the file ends before that."""
    # No memory map: if the file were cut later, the process would be killed; if edited, the weights would change.
    with path.open("rb", 0) as file:
        while chunks:
            _, _, rows, begin = chunks.pop(0)
            memory = rows.view(-1).view(torch.uint8).numpy().data
            file.seek(begin)
            while memory:
                if not (n := file.readinto(memory)):
                    raise OSError("the file is cut")
                memory = memory[n:]


def write_file(
    path: Path, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], tensors: Iterator[Tensor]
) -> None:
    """Writes the header, then `tensors` in the order of `entries`, with only one in memory at a time.

    Call it within `new_directory`: an error leaves half a file.

    Raises:
        CheckpointPathError: the file cannot be written.
        ValueError: `tensors` do not match `entries`.
    """
    entries = list(entries)
    header = _header_bytes(entries)
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
        do = f"make room for {n_bytes} bytes or give another path"
        raise CheckpointPathError(f"cannot write {path}: {error.strerror}; {do}") from None


def _header_bytes(entries: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        if name in header:
            raise ValueError(f"the name {name} is announced twice or is reserved")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
