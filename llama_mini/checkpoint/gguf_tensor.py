"""The values of a GGUF file's tensors. The block arithmetic is the `gguf` library's."""

import math
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.gguf_file import TensorInfo, shown
from llama_mini.errors import CheckpointFormatError

_AT_ONCE = 1 << 20  # elements of a whole tensor that are widened to float32 at a time

_HEADS = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}  # bytes of float16 before those of codes, in a block of 32 columns


class Codes(NamedTuple):
    """Rows of a matrix as codes, (rows, columns) uint8, and float16 for each 32 columns of a row.

    value = scale · code + least of 4 bits; scale · (code − 128) of 8 bits, which have no `least`.
    """

    codes: Tensor
    scale: Tensor
    least: Tensor | None


def read_codes(file: BinaryIO, info: TensorInfo, at_once: int) -> Iterator[tuple[int, Codes]]:
    """The codes of a Q4_0, Q4_1 or Q8_0 tensor as they are stored: the first row of `at_once`, and these.

    Raises CheckpointFormatError where the data end early.
    """
    head = _HEADS[info.type]
    for first, rows in _stored_rows(file, info, at_once):
        blocks = rows.view(len(rows), info.shape[-1] // 32, -1)
        floats = blocks[..., :head].contiguous().view(torch.float16)
        scale, stored = floats[..., 0], blocks[..., head:]
        if info.type == "Q8_0":
            yield first, Codes((stored + 128).flatten(1), scale, None)
        else:
            codes = torch.cat((stored & 15, stored >> 4), dim=-1).flatten(1)
            yield first, Codes(codes, scale, floats[..., 1] if info.type == "Q4_1" else -8 * scale)


def read_tensor(file: BinaryIO, info: TensorInfo, dtype: torch.dtype = torch.float32) -> Tensor:
    """One tensor in `info.shape`. `file` is the open GGUF file that `info` came from. Raises as `read_rows` does."""
    values = torch.empty(info.shape, dtype=dtype)
    for first, rows in read_rows(file, info, dtype, max(1, _AT_ONCE // info.shape[-1])):
        values.view(-1, info.shape[-1])[first : first + len(rows)] = rows
    return values


def read_rows(file: BinaryIO, info: TensorInfo, dtype: torch.dtype, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """The tensor as rows of numbers: the first of `at_once`, and these, (rows, columns).

    Raises:
        CheckpointFormatError: the type is one that cannot be turned into numbers, or the data end early.
    """
    from gguf import GGMLQuantizationType, quants  # 100 ms, which reading a header need not pay

    for first, rows in _stored_rows(file, info, at_once):
        try:
            wide = quants.dequantize(rows.numpy(), GGMLQuantizationType[info.type])
        except NotImplementedError:
            raise CheckpointFormatError(
                f"{file.name}: tensor {shown(info.name)} is {info.type}, which cannot be turned into numbers here; "
                "use a file with another quantisation"
            ) from None
        yield first, torch.from_numpy(np.require(wide, requirements=["C", "W"])).to(dtype)


def _stored_rows(file: BinaryIO, info: TensorInfo, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """The first of some rows, and their bytes, (rows, bytes)."""
    n_rows = math.prod(info.shape[:-1])
    for first in range(0, n_rows, at_once):
        rows = torch.empty(min(at_once, n_rows - first), info.n_bytes // n_rows, dtype=torch.uint8)
        file.seek(info.offset + first * rows.shape[1])
        if file.readinto(rows.numpy().data) != rows.nbytes:  # type: ignore[attr-defined]
            raise CheckpointFormatError(
                f"{file.name}: the file ends inside tensor {shown(info.name)}; download it again"
            )
        yield first, rows
