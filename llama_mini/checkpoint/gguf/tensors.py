"""The values of a GGUF file's tensors, read in chunks of rows; the `gguf` library turns blocks into floats."""

import math
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.gguf.blocks import CODES, Blocks
from llama_mini.checkpoint.gguf.header import GGUFTensor
from llama_mini.errors import CheckpointFormatError
from llama_mini.validate import short_repr

CHUNK = 1 << 18  # elements that are in memory at once, besides the tensor that they go to: gguf makes copies in float32

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def kept(kind: str) -> tuple[str | None, bool]:
    """The format that a type is kept in, None for floats, and whether its blocks are codes of that format."""
    if kind in FLOATS:
        return None, False
    return (CODES[kind][0], True) if kind in CODES else ("int8", False)


def read_blocks(file: BinaryIO, tensor: GGUFTensor, at_once: int) -> Iterator[tuple[int, Blocks]]:
    """A matrix as it is stored, `at_once` rows at a time, with the index of the first. Raises as `read_rows` does."""
    return ((first, Blocks(rows, tensor.type)) for first, rows in _stored_rows(file, tensor, at_once))


def read_tensor(file: BinaryIO, tensor: GGUFTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole tensor in its shape, from the open GGUF file that holds it. Raises as `read_rows` does."""
    values = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    for first, rows in read_rows(file, tensor, dtype, max(1, CHUNK // tensor.shape[-1])):
        values.view(-1, tensor.shape[-1])[first : first + len(rows)] = rows
    return values


def read_rows(file: BinaryIO, tensor: GGUFTensor, dtype: torch.dtype, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """A tensor as floats, (rows, columns), `at_once` rows at a time, with the index of the first.

    Raises:
        CheckpointFormatError: the type cannot be dequantised, or the data end early.
    """
    if tensor.type in FLOATS:
        yield from (
            (first, rows.view(FLOATS[tensor.type]).to(dtype)) for first, rows in _stored_rows(file, tensor, at_once)
        )
        return
    from gguf import GGMLQuantizationType, quants  # 100 ms, which the formats above do not need

    for first, rows in _stored_rows(file, tensor, at_once):
        try:
            with np.errstate(all="ignore"):  # a broken scale is infinite, and is found where the numbers are used
                wide = quants.dequantize(rows.numpy(), GGMLQuantizationType[tensor.type])
        except NotImplementedError:
            raise CheckpointFormatError(
                f"{file.name}: tensor {short_repr(tensor.name)} is {tensor.type}, which cannot be dequantised; "
                "use a file with another quantisation"
            ) from None
        yield first, torch.from_numpy(np.require(wide, requirements=["C", "W"])).to(dtype)


def _stored_rows(file: BinaryIO, tensor: GGUFTensor, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """The bytes of the rows, (rows, bytes) uint8, `at_once` rows at a time, with the index of the first."""
    n_rows = math.prod(tensor.shape[:-1])
    for first in range(0, n_rows, at_once):
        rows = torch.empty(min(at_once, n_rows - first), tensor.n_bytes // n_rows, dtype=torch.uint8, device="cpu")
        file.seek(tensor.offset + first * rows.shape[1])
        if file.readinto(rows.numpy().data) != rows.nbytes:  # type: ignore[attr-defined]
            raise CheckpointFormatError(
                f"{file.name}: the file ends inside tensor {short_repr(tensor.name)}; download it again"
            )
        yield first, rows
