"""Linear layers in int8, int5 or int4.

Quantized weights lie in blocks of 16 rows. In a block, four neighbouring columns of a row are adjacent, since one VNNI
instruction multiplies them (native/codes.h). Each part begins with a new block; unused rows and columns are zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_mini.checkpoint.gguf.blocks import Blocks
from llama_mini.checkpoint.source import StoredCodes
from llama_mini.errors import CheckpointFormatError
from llama_mini.optimize.packed_linear import PackedLinear, supported

BLOCK_ROWS = 16  # rows of a block of quantized weights
GROUP = 32  # columns that share a scale (and a minimum)
_QUANTIZE_ROWS = 512  # rows quantized at a time: a whole embedding in float32 may take as much memory as the model
_DEQUANTIZE_ROWS = 16384  # rows dequantized at a time where there are no operators
_REPACKED = {8: ("Q8_0",), 4: ("Q4_0", "Q4_1")}  # by bits: GGUF formats that an operator stores by itself


class QuantizedLinear(PackedLinear):
    """Weights as codes of 8, 5 or 4 bits, with a float16 scale for each group of 32 columns of a row.

    With fewer than 8 bits a group has a float16 minimum too.
    """

    block_rows = BLOCK_ROWS
    bits: ClassVar[int]
    qweight: Tensor
    scales: Tensor
    mins: Tensor | None

    def __init__(self, parts: Sequence[int], columns: int, dtype: torch.dtype, *rest: Any, **named: Any) -> None:
        super().__init__(parts, columns, dtype, *rest, **named)
        self.n_groups = -(-columns // GROUP)
        blocks, vectors = self.rows // BLOCK_ROWS, self.n_groups * self.bits
        qweight = torch.empty(blocks, vectors, BLOCK_ROWS, 4, dtype=torch.uint8)
        self.register_buffer("qweight", qweight, persistent=False)
        scales = torch.empty(blocks, self.n_groups, BLOCK_ROWS, dtype=torch.float16)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("mins", torch.empty_like(scales) if self.bits < 8 else None, persistent=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.qweight, self.scales] if self.mins is None else [self.qweight, self.scales, self.mins]

    def load(self, part: int, weight: Tensor, first: int = 0) -> None:
        if self.kernels and supported(weight.dtype, weight.device):
            self._check(torch.ops.llama_mini.quantize(weight.contiguous(), self.tensors, self._block(part, first)))
            return
        for begin in range(0, len(weight), _QUANTIZE_ROWS):
            rows = weight[begin : begin + _QUANTIZE_ROWS].float()
            if self.columns % GROUP:
                rows = F.pad(rows, (0, self.n_groups * GROUP - self.columns))
            self.store(part, first + begin, *self.quantize(rows.view(len(rows), self.n_groups, -1)))

    def load_codes(self, part: int, rows: StoredCodes, first: int = 0) -> None:
        """Stores rows of a part without requantizing them; `first` is a multiple of BLOCK_ROWS.

        They are codes of this format, or of int4 for int5, in whole groups of 32 columns. Raises CheckpointFormatError
        for a scale or minimum that is not finite.
        """
        block, ops = self._block(part, first), torch.ops.llama_mini
        if not self.kernels:
            self.store(part, first, *rows.unpacked())
        elif isinstance(rows, Blocks) and rows.number_format in _REPACKED.get(self.bits, ()):
            self._check(ops.repack(rows.rows.contiguous(), self.tensors, self.columns, block))
        else:
            codes = [tensor.contiguous() for tensor in rows.unpacked() if tensor is not None]
            self._check(ops.pack(codes, self.tensors, block))

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows, groups, GROUP) float32 -> weights (rows, columns) uint8, scales and mins (rows, groups)."""
        raise NotImplementedError

    def store(self, part: int, first: int, quantized: Tensor, scales: Tensor, mins: Tensor | None) -> None:
        """Stores what `quantize` returns for rows of a part, from row `first` on, a multiple of BLOCK_ROWS."""
        self._check(all(bool(torch.isfinite(t).all()) for t in (scales, mins) if t is not None))
        padding = -len(quantized) % BLOCK_ROWS  # zeros fill the last block of a part
        blocks = slice(self._block(part, first), self._block(part, first + len(quantized) + padding))
        quads = F.pad(quantized, (0, 0, 0, padding)).view(torch.int32)  # four columns move as one number
        vectors = self.pack(quads).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
        self.qweight[blocks].view(torch.int32).copy_(vectors[..., None])
        for buffer, values in ((self.scales, scales), (self.mins, mins)):
            if buffer is not None and values is not None:
                buffer[blocks] = F.pad(values, (0, 0, 0, padding)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)

    def _block(self, part: int, row: int) -> int:
        return (self.offsets[part] + row) // BLOCK_ROWS

    def _check(self, finite: bool) -> None:
        if not finite:
            raise CheckpointFormatError(f"a matrix of {self.columns} columns holds numbers that {self.name} cannot")

    def pack(self, quads: Tensor) -> Tensor:
        """Quantized weights as they are stored; an int32 is four columns: (rows, quads) -> (rows, vectors)."""
        return quads

    def unpack(self, vectors: Tensor) -> Tensor:
        """The inverse of `pack`, on bytes: (n, vectors, 4) -> (n, quads, 4)."""
        return vectors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        scales, mins = self.scales, self.mins
        super()._apply(fn, recurse)
        self.scales = scales.to(self.qweight.device)  # .to(dtype) changes input and output, not the scales
        self.mins = None if mins is None else mins.to(self.qweight.device)
        return self

    def lookup(self, rows: Tensor) -> Tensor:
        if self.kernels:
            return torch.ops.llama_mini.dequantize_rows(self.tensors, rows, self.columns, self.dtype)
        shape, rows = rows.shape, rows.flatten()
        block, row = rows // BLOCK_ROWS, rows % BLOCK_ROWS
        quantized = self.unpack(self.qweight[block, :, row]).reshape(len(rows), self.n_groups, -1).float()
        scales = self.scales[block, :, row].float()[..., None]
        if self.mins is None:
            values = (quantized - 128) * scales
        else:
            values = quantized * scales + self.mins[block, :, row].float()[..., None]
        return values.flatten(1)[:, : self.columns].to(self.dtype).reshape(*shape, -1)

    def forward_torch(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.width)
        for first in range(0, self.width, _DEQUANTIZE_ROWS):
            rows = slice(first, min(first + _DEQUANTIZE_ROWS, self.width))
            weight = self.lookup(torch.arange(rows.start, rows.stop, device=x.device))
            y[..., rows] = F.linear(x, weight, None if self.bias is None else self.bias[rows])
        return y


class Int8Linear(QuantizedLinear):
    """w = scale · (q − 128), with a scale for each group, as in GGUF's Q8_0."""

    name, bits = "int8", 8

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scales = (groups.abs().amax(-1) / 127).half()
        quantized = (groups / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8)  # PyTorch is slow at uint8
        return quantized.view(torch.uint8).add_(128).flatten(1), scales, None


class Int4Linear(QuantizedLinear):
    """w = scale · q + min, with a scale and a minimum for each group, as in GGUF's Q4_1. Two weights a byte."""

    name, bits = "int4", 4

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        most = 2**self.bits - 1
        mins = groups.amin(-1).half()
        scales = ((groups.amax(-1) - mins.float()) / most).half()
        quantized = (groups - mins.float()[..., None]).div_(_divisor(scales)).round_().clamp_(0, most).to(torch.int8)
        return quantized.view(torch.uint8).flatten(1), scales, mins

    def pack(self, quads: Tensor) -> Tensor:
        return quads[:, 0::2] | (quads[:, 1::2] << 4)

    def unpack(self, vectors: Tensor) -> Tensor:
        return torch.stack((vectors & 15, vectors >> 4), 2).flatten(1, 2)


class Int5Linear(Int4Linear):
    """As int4, with five bits, as in GGUF's Q5_1. After the low four bits of a group's codes come the fifth bits."""

    name, bits = "int5", 5

    def pack(self, quads: Tensor) -> Tensor:
        low = super().pack(quads & 0x0F0F0F0F).unflatten(1, (-1, 4))
        shifts = torch.arange(GROUP // 4, dtype=torch.int32, device=quads.device)  # bit i is that of quad i
        fifth = (quads >> 4 & 0x01010101).unflatten(1, (-1, GROUP // 4)) << shifts
        return torch.cat((low, fifth.sum(-1, keepdim=True, dtype=torch.int32)), -1).flatten(1)

    def unpack(self, vectors: Tensor) -> Tensor:
        groups = vectors.unflatten(1, (-1, 5))
        shifts = torch.arange(GROUP // 4, dtype=torch.uint8, device=vectors.device)[:, None]
        fifth = (groups[:, :, 4:] >> shifts & 1) << 4
        return super().unpack(groups[:, :, :4].flatten(1, 2)) | fifth.flatten(1, 2)


def _divisor(scales: Tensor) -> Tensor:
    """A group of zeros, or in int4 of equal numbers, has scale 0. Divided by infinity, its weights become 0."""
    return torch.where(scales == 0, math.inf, scales.float())[..., None]
