"""The values of a GGUF file's tensors. The block arithmetic is the `gguf` library's."""

import math
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.gguf.header import TensorInfo, shown
from llama_mini.errors import CheckpointFormatError

_AT_ONCE = 1 << 20  # elements of a whole tensor that are widened to float32 at a time

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADS = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}  # bytes of float16 before those of codes, in a block of 32 columns


class Codes(NamedTuple):
    """Rows of a matrix as codes, (rows, columns) uint8, and float16 for each 32 columns of a row.

    value = scale · code + least of 4 bits; scale · (code − 128) of 8 bits, which have no `least`.
    """

    codes: Tensor
    scale: Tensor
    least: Tensor | None


class Blocks(NamedTuple):
    """Rows of a matrix as a Q4_0, Q4_1 or Q8_0 tensor stores them: (rows, bytes) uint8."""

    rows: Tensor
    number_format: str

    def codes(self) -> Codes:
        n_codes = 32 if self.number_format == "Q8_0" else 16  # bytes of them in a block; the others are float16
        n_bytes = _HEADS[self.number_format] + n_codes
        blocks = self.rows.view(len(self.rows), -1, n_bytes)
        floats = blocks[..., :-n_codes].contiguous().view(torch.float16)
        scale, stored = floats[..., 0], blocks[..., -n_codes:]
        if self.number_format == "Q8_0":
            return Codes((stored + 128).flatten(1), scale, None)
        codes = torch.cat((stored & 15, stored >> 4), dim=-1).flatten(1)
        return Codes(codes, scale, floats[..., 1] if self.number_format == "Q4_1" else -8 * scale)


def read_blocks(file: BinaryIO, info: TensorInfo, at_once: int) -> Iterator[tuple[int, Blocks]]:
    """The tensor as it is stored: the first row of `at_once`, and these. CheckpointFormatError where it ends early."""
    return ((first, Blocks(rows, info.type)) for first, rows in _stored_rows(file, info, at_once))


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
    if info.type in FLOATS:
        yield from (
            (first, rows.view(FLOATS[info.type]).to(dtype)) for first, rows in _stored_rows(file, info, at_once)
        )
        return
    from gguf import GGMLQuantizationType, quants  # 100 ms, which codes and floats need not wait for

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
