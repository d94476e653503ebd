"""Linear layers whose weights are codes of a few bits, in any of the formats of checkpoint/code_formats.py.

Codes lie in blocks of 16 rows. In a block, four neighbouring columns of a row are adjacent, since one VNNI instruction
multiplies them, and each of a code's bits lies in a vector by itself or beside others (native/codes.h). Each part
begins with a new block; unused rows and columns are zero.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_mini.checkpoint.code_formats import SUPER_BLOCK, code_format
from llama_mini.checkpoint.gguf.blocks import Blocks
from llama_mini.checkpoint.source import StoredCodes
from llama_mini.errors import CheckpointFormatError
from llama_mini.machine import one_thread
from llama_mini.optimize.packed_linear import PackedLinear, supported

BLOCK_ROWS = 16  # rows of a block of codes
COLUMNS = 32  # of a row that lie together; they have one scale or two, or share one with others
_QUADS = COLUMNS // 4
_QUANTIZE_ROWS = 512  # rows quantized at a time: a whole embedding in float32 may take as much memory as the model
_DEQUANTIZE_ROWS = 16384  # rows dequantized at a time where there are no operators
# GGUF types that an operator stores by itself
_REPACKED = {"int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1"), "int4sym": ("Q4_0",)}


class QuantizedLinear(PackedLinear):
    """Weights as codes of a format, by its name in code_formats.py, with scales for groups of columns."""

    block_rows = BLOCK_ROWS
    qweight: Tensor
    scales: Tensor
    mins: Tensor | None
    table: Tensor | None
    super_scales: Tensor | None  # (blocks, n, 1 or 2, BLOCK_ROWS) float16: factors of int8 scales, and of minimums

    def __init__(self, name: str, parts: Sequence[int], columns: int, dtype: torch.dtype, *rest: Any) -> None:
        super().__init__(parts, columns, dtype, *rest)
        self.name, self.format = name, code_format(name)
        steps, blocks = -(-columns // COLUMNS), self.rows // BLOCK_ROWS
        self.n_groups = -(-steps * COLUMNS // self.format.group)
        n_super = -(-self.columns // SUPER_BLOCK)
        dtype_of_scales = torch.int8 if self.format.super_blocks else torch.float16
        scales = torch.empty(blocks, self.n_groups, BLOCK_ROWS, dtype=dtype_of_scales)
        super_scales = torch.empty(blocks, n_super, 1 + self.format.has_min, BLOCK_ROWS, dtype=torch.float16)
        buffers = {
            "qweight": torch.empty(blocks, steps, self.format.bits, BLOCK_ROWS, 4, dtype=torch.uint8),
            "scales": scales,
            "mins": torch.empty_like(scales) if self.format.has_min else None,
            "table": None if self.format.table is None else torch.tensor(self.format.table, dtype=torch.float16),
            "super_scales": super_scales if self.format.super_blocks else None,
        }
        for buffer, tensor in buffers.items():
            self.register_buffer(buffer, tensor, persistent=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qweight, self.scales, self.mins, self.table, self.super_scales) if t is not None]

    def load(self, part: int, weight: Tensor, first: int = 0) -> None:
        if self.kernels and supported(weight.dtype, weight.device):
            self._check(torch.ops.llama_mini.quantize(weight.contiguous(), self.tensors, self._block(part, first)))
            return
        for begin in range(0, len(weight), _QUANTIZE_ROWS):
            rows = weight[begin : begin + _QUANTIZE_ROWS].float()
            groups = F.pad(rows, (0, -self.columns % COLUMNS)).unflatten(1, (-1, COLUMNS))
            self.store(part, first + begin, *self.quantize(groups))

    def load_codes(self, part: int, rows: StoredCodes, first: int = 0) -> None:
        """Stores rows of a part without requantizing them; `first` is a multiple of BLOCK_ROWS.

        They are codes that this format holds (`holds_codes`), of whole groups of 32, or of 16, columns. Raises
        CheckpointFormatError for a scale or minimum that is not finite.
        """
        block, ops = self._block(part, first), torch.ops.llama_mini
        if self.kernels and isinstance(rows, Blocks) and rows.number_format in _REPACKED.get(self.name, ()):
            self._check(ops.repack(rows.rows.contiguous(), self.tensors, self.columns, block))
            return
        with one_thread():
            found = rows.unpacked()
            codes, scale, least, super_scales = found if self.format.super_blocks else found.multiplied()
        if least is None and self.format.has_min:
            least = -8 * scale  # of int4sym, the only format without minimums whose codes one with them holds
        scale, least = self._of_groups(scale), None if least is None else self._of_groups(least)
        if self.kernels:
            packed = [tensor.contiguous() for tensor in (codes, scale, least, super_scales) if tensor is not None]
            self._check(ops.pack(packed, self.tensors, block))
        else:
            self.store(part, first, codes, scale, least, super_scales)

    def _of_groups(self, values: Tensor) -> Tensor:
        """Scales or minimums of the file's groups, each repeated for those of this format where these are smaller."""
        n = -(-self.columns // self.format.group)
        times = 1 << (-(-n // values.shape[1]) - 1).bit_length()  # a power of two, with a part of the last group
        return values if times == 1 else values.repeat_interleave(times, 1)[:, :n]

    def quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows, groups, COLUMNS) float32 -> codes (rows, columns) uint8, scales and mins (rows, groups).

        For int8, as GGUF's Q8_0 has it, and for groups of 32 with a minimum, as Q4_1.
        """
        if self.name == "int8":
            scales = (groups.abs().amax(-1) / 127).half()
            codes = (groups / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8)  # PyTorch is slow at uint8
            return codes.view(torch.uint8).add_(128).flatten(1), scales, None
        if not self.format.has_min or self.format.group != COLUMNS or self.format.super_blocks:
            raise NotImplementedError(f"floats are not quantized to {self.name}")
        most, mins = 2**self.format.bits - 1, groups.amin(-1).half()
        scales = ((groups.amax(-1) - mins.float()) / most).half()
        codes = (groups - mins.float()[..., None]).div_(_divisor(scales)).round_().clamp_(0, most).to(torch.int8)
        return codes.view(torch.uint8).flatten(1), scales, mins

    def store(
        self,
        part: int,
        first: int,
        codes: Tensor,
        scales: Tensor,
        mins: Tensor | None,
        super_scales: Tensor | None = None,
    ) -> None:
        """Stores rows of a part, as `quantize` or `unpacked` return them; `first` is a multiple of BLOCK_ROWS."""
        self._check(all(bool(torch.isfinite(t).all()) for t in (scales, mins, super_scales) if t is not None))
        padding = -len(codes) % BLOCK_ROWS  # zeros fill the last block of a part, and the last columns of a row
        blocks = slice(self._block(part, first), self._block(part, first + len(codes) + padding))
        quads = F.pad(codes, (0, -codes.shape[1] % COLUMNS, 0, padding)).view(torch.int32)  # four columns as one number
        vectors = self.pack(quads).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
        self.qweight[blocks].flatten(1, 2).view(torch.int32).copy_(vectors[..., None])
        for buffer, values in ((self.scales, scales), (self.mins, mins)):
            if buffer is not None and values is not None:
                values = F.pad(values, (0, self.n_groups - values.shape[1], 0, padding))
                buffer[blocks] = values.unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
        if self.super_scales is not None:
            assert super_scales is not None
            factors = F.pad(super_scales, (0, 0, 0, padding)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
            self.super_scales[blocks] = factors.unflatten(1, self.super_scales.shape[1:3])

    def _block(self, part: int, row: int) -> int:
        return (self.offsets[part] + row) // BLOCK_ROWS

    def _check(self, finite: bool) -> None:
        if not finite:
            raise CheckpointFormatError(f"a matrix of {self.columns} columns holds numbers that {self.name} cannot")

    def pack(self, quads: Tensor) -> Tensor:
        """Codes as they are stored; an int32 is four columns: (rows, quads) -> (rows, vectors)."""
        if self.format.bits == 8:
            return quads
        groups, planes = quads.unflatten(1, (-1, _QUADS)), list[Tensor]()
        for width, at in _planes(self.format.bits):
            shifts = torch.arange(0, 8, width, dtype=torch.int32, device=quads.device)
            bits = (groups >> at & (2**width - 1) * 0x01010101).unflatten(2, (width, -1)) << shifts
            planes.append(bits.sum(-1, dtype=torch.int32))
        return torch.cat(planes, 2).flatten(1)

    def unpack(self, vectors: Tensor) -> Tensor:
        """The inverse of `pack`, on bytes: (n, vectors, 4) -> (n, quads, 4)."""
        if self.format.bits == 8:
            return vectors
        planes = vectors.unflatten(1, (-1, self.format.bits)).split([w for w, _ in _planes(self.format.bits)], 2)
        quads = vectors.new_zeros(len(vectors), planes[0].shape[1], _QUADS, 4)
        for (width, at), plane in zip(_planes(self.format.bits), planes, strict=True):
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=vectors.device)[:, None]
            quads |= ((plane[:, :, :, None] >> shifts & 2**width - 1) << at).flatten(2, 3)
        return quads.flatten(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        scales, others = self.scales, (self.mins, self.table, self.super_scales)
        super()._apply(fn, recurse)
        self.scales = scales.to(self.qweight.device)  # .to(dtype) changes input and output, not the scales
        self.mins, self.table, self.super_scales = (None if t is None else t.to(self.qweight.device) for t in others)
        return self

    def lookup(self, rows: Tensor) -> Tensor:
        if self.kernels:
            return torch.ops.llama_mini.dequantize_rows(self.tensors, rows, self.columns, self.dtype)
        shape, rows = rows.shape, rows.flatten()
        block, row = rows // BLOCK_ROWS, rows % BLOCK_ROWS
        width = min(self.format.group, COLUMNS)
        codes = self.unpack(self.qweight.flatten(1, 2)[block, :, row]).reshape(len(rows), -1, width)
        group = torch.arange(codes.shape[1], device=rows.device) * width // self.format.group
        values = codes.float() if self.table is None else self.table.float()[codes.int()]
        if self.mins is None and self.table is None:
            values -= 2 ** (self.format.bits - 1)
        scales = [t[block, :, row][:, group].float() for t in (self.scales, self.mins) if t is not None]
        if self.super_scales is not None:
            of_group = torch.arange(codes.shape[1], device=rows.device) * width // SUPER_BLOCK
            scales = [t * self.super_scales[block, :, i, row][:, of_group].float() for i, t in enumerate(scales)]
        values *= scales[0][..., None]
        if self.mins is not None:
            values += scales[1][..., None]
        return values.flatten(1)[:, : self.columns].to(self.dtype).reshape(*shape, -1)

    def forward_torch(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.width)
        for first in range(0, self.width, _DEQUANTIZE_ROWS):
            rows = slice(first, min(first + _DEQUANTIZE_ROWS, self.width))
            weight = self.lookup(torch.arange(rows.start, rows.stop, device=x.device))
            y[..., rows] = F.linear(x, weight, None if self.bias is None else self.bias[rows])
        return y


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """The powers of two whose sum is `bits`, the largest first, and where the bits of each begin in a code."""
    at = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, at
            at += width


def _divisor(scales: Tensor) -> Tensor:
    """A group of zeros, or with a minimum of equal numbers, has scale 0. Divided by infinity, its weights become 0."""
    return torch.where(scales == 0, math.inf, scales.float())[..., None]
