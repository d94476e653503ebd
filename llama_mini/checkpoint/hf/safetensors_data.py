"""The tensors of safetensors files, read by their rows into the memory where they stay; and a streaming writer."""

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
    NAMES,
    TensorInfo,
    changed,
    position,
    read_header,
    weight_dtype,
)
from llama_mini.errors import CheckpointError, CheckpointPathError

_LARGEST = 2**63 - 1
_AT_ONCE = 1 << 21  # bytes after which the next tensor waits: with fewer, the call of a second thread would be felt
_PIECE = 1 << 20  # bytes that a thread reads before it takes more

Room = Callable[[str, int, tuple[int, ...]], Tensor | None]  # name, first row, shape -> where these rows are to lie


def no_room(name: str, first: int, shape: tuple[int, ...]) -> None:
    """What reads may allocate for itself."""


class _Rows(NamedTuple):
    """Rows of a tensor that are being read: `begin` in bytes from the data's start."""

    info: TensorInfo
    first: int
    rows: Tensor
    begin: int


def read_tensors(infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, Tensor]]:
    """The weights that `read_header` found, each read once, file after file in the order of the data.

    Raises CheckpointFormatError if a file is not what it was then, or holds something else than weights.
    """
    return ((info, tensor) for info, _, tensor in read_rows(infos, lambda _: _LARGEST))


def read_rows(
    infos: Iterable[TensorInfo], at_once: Callable[[int], int], room: Room = no_room
) -> Iterator[tuple[TensorInfo, int, Tensor]]:
    """The same, of a matrix of so many columns `at_once` rows: the first of them, and these.

    They are read into `room` where it gives some that has the file's dtype.
    """
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        by_file.setdefault(info.file, []).append(info)
    for path, wanted in by_file.items():
        dtypes = {info: weight_dtype(info) for info in sorted(wanted, key=position)}
        try:
            stamp = _stamp(path)
            found = read_header(path)
            # No memory map: a file that is cut later must not kill the process, nor an edit change weights.
            with path.open("rb", 0) as file, path.open("rb", 0) as second, ThreadPoolExecutor(1) as helper:
                start = 8 + int.from_bytes(file.read(8), "little")
                batch = deque[_Rows]()
                for coming in chain(_batches(dtypes, at_once, room), [deque[_Rows]()]):
                    # A second thread reads on while the rows before are taken, and then this one helps it.
                    pieces = deque(piece for each in coming for piece in _pieces(start + each.begin, each.rows))
                    reading = helper.submit(_fill, second, pieces)
                    while batch:
                        info, first, rows, _ = batch.popleft()
                        if _stamp(path) != stamp or found.get(info.name) != info:
                            raise changed(path)
                        yield info, first, rows
                        del rows  # before the next ones are made
                    _fill(file, pieces)
                    reading.result()
                    batch = coming
        except (CheckpointError, OSError):
            raise changed(path) from None


def _batches(
    dtypes: Mapping[TensorInfo, torch.dtype], at_once: Callable[[int], int], room: Room
) -> Iterator[deque[_Rows]]:
    batch, n_bytes = deque[_Rows](), 0
    for info, dtype in dtypes.items():
        begin = info.begin
        for first, shape in _blocks(info.shape, at_once):
            rows = room(info.name, first, shape)
            if rows is None or rows.dtype != dtype or not (rows.is_cpu and rows.is_contiguous()):
                rows = torch.empty(shape, dtype=dtype)
            batch.append(_Rows(info, first, rows, begin))
            begin += rows.nbytes
            n_bytes += rows.nbytes
            del rows
            if n_bytes >= _AT_ONCE:
                yield batch
                batch, n_bytes = deque(), 0
    yield batch


def _pieces(begin: int, rows: Tensor) -> Iterator[tuple[int, memoryview]]:
    memory = rows.view(-1).view(torch.uint8).numpy().data
    return ((begin + at, memory[at : at + _PIECE]) for at in range(0, len(memory), _PIECE))


def _fill(file: FileIO, pieces: deque[tuple[int, memoryview]]) -> None:
    """Reads pieces, which other threads take some of, until there are none. Raises OSError where the file ends."""
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


def _blocks(shape: tuple[int, ...], at_once: Callable[[int], int]) -> list[tuple[int, tuple[int, ...]]]:
    """The first row, and the shape, of each block of rows; what is no matrix is one block."""
    if len(shape) != 2 or shape[0] <= (n := at_once(shape[1])):
        return [(0, shape)]
    return [(first, (min(n, shape[0] - first), shape[1])) for first in range(0, shape[0], n)]


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
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _stamp(path: Path) -> tuple[int, ...]:
    """Differs once a file has been written to or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
