"""The values of a GGUF file's tensors. The block arithmetic is the `gguf` library's."""

from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.gguf_file import TensorInfo, shown
from llama_mini.errors import CheckpointFormatError

_AT_ONCE = (
    1 << 22
)  # elements widened to float32 at a time: a whole embedding would double the memory that loading takes

_FOUR_BITS = {"Q4_0": 2, "Q4_1": 4}  # bytes of float16 before the sixteen of codes, in a block of 32 columns


class Codes(NamedTuple):
    """A matrix of 4 bits, value = scale · code + least: (rows, columns) uint8, and one of each for 32 columns."""

    codes: Tensor
    scale: Tensor
    least: Tensor


def read_codes(file: BinaryIO, info: TensorInfo) -> Codes:
    """The codes of a Q4_0 or Q4_1 tensor as they are stored. Raises CheckpointFormatError where the data end early."""
    n_rows, width = info.shape
    head = _FOUR_BITS[info.type]
    file.seek(info.offset)
    data = file.read(info.n_bytes)
    if len(data) != info.n_bytes:
        raise _ended(file, info)
    blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(n_rows, width // 32, head + 16)
    floats = blocks[..., :head].contiguous().view(torch.float16)
    packed = blocks[..., head:]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1).view(n_rows, width)
    scale = floats[..., 0]
    return Codes(codes, scale, floats[..., 1] if info.type == "Q4_1" else -8 * scale)


def read_tensor(file: BinaryIO, info: TensorInfo, dtype: torch.dtype = torch.float32) -> Tensor:
    """One tensor in `info.shape`. `file` is the open GGUF file that `info` came from.

    Raises:
        CheckpointFormatError: the type is one that cannot be turned into numbers, or the data end early.
    """
    from gguf import GGMLQuantizationType, quants  # 100 ms, which reading a header need not pay

    width = info.shape[-1]
    n_rows = int(np.prod(info.shape[:-1], dtype=np.int64))
    row_bytes = info.n_bytes // n_rows
    step = max(1, _AT_ONCE // width)
    values = torch.empty(n_rows, width, dtype=dtype)
    file.seek(info.offset)
    for first in range(0, n_rows, step):
        n = min(step, n_rows - first)
        data = file.read(n * row_bytes)
        if len(data) != n * row_bytes:
            raise _ended(file, info)
        rows = np.frombuffer(data, np.uint8).reshape(n, row_bytes)
        try:
            wide = quants.dequantize(rows, GGMLQuantizationType[info.type])
        except NotImplementedError:
            raise CheckpointFormatError(
                f"{file.name}: tensor {shown(info.name)} is {info.type}, which cannot be turned into numbers here; "
                "use a file with another quantisation"
            ) from None
        values[first : first + n] = torch.from_numpy(np.require(wide, requirements=["C", "W"]))
    return values.view(info.shape)


def _ended(file: BinaryIO, info: TensorInfo) -> CheckpointFormatError:
    return CheckpointFormatError(f"{file.name}: the file ends inside tensor {shown(info.name)}; download it again")
