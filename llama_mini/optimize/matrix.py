"""Weight formats: one stored copy of a matrix, or of several that read the same input, behind one small interface.

Codes lie in blocks of sixteen rows and 32 columns, zeros where a part of the matrix ends before its block does; four
columns of a row stand side by side (native/rows.h). Each part begins with a block.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_mini.checkpoint.gguf.tensors import Blocks
from llama_mini.errors import CheckpointFormatError

BLOCK, STEP = 16, 32  # rows and columns that codes come in
_AT_ONCE = 512  # rows that are quantised at once: a whole embedding in float32 would be a second model
_WIDENED = 16384  # rows that stand as floats at once where there are no operators
FEW = 16  # rows of input up to which each result is summed in the same order, whoever shares the batch


class Matrix(nn.Module):
    """y = x · [W0; W1; ...]ᵀ + b, for parts W0, W1, ... that all read x. Parts are filled by `put`.

    Args:
        parts: rows of each.
        columns: width of the input.
        dtype: of the input and the output.
        kernels: whether torch.ops.llama_mini is there.

    Shape: (..., columns) -> (..., width), where `begins[i]` is where part i begins.
    """

    name: ClassVar[str]
    block: ClassVar[int] = BLOCK

    def __init__(
        self,
        parts: Sequence[int],
        columns: int,
        dtype: torch.dtype,
        kernels: bool,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.parts, self.columns, self.dtype, self.kernels = parts, columns, dtype, kernels
        sizes = [-(-rows // self.block) * self.block for rows in parts]
        self.begins = [sum(sizes[:i]) for i in range(len(parts))]
        self.rows = sum(sizes)
        self.width = self.rows if len(parts) > 1 else parts[0]
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(self.width, dtype=dtype) if bias else None, persistent=False)

    @property
    def tensors(self) -> list[Tensor]:
        """As the operators take a matrix."""
        raise NotImplementedError

    @property
    def bias_or_nothing(self) -> Tensor:
        """As the operators take it: empty where there is none."""
        return torch.empty(0, dtype=self.dtype) if self.bias is None else self.bias

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    def put(self, part: int, weight: Tensor, first: int = 0) -> None:
        """Stores rows of a part, (rows, columns), from floats; `first` is a multiple of BLOCK."""
        raise NotImplementedError

    def room(self, part: int, first: int, n: int) -> Tensor | None:
        """Where n rows of a part lie, if as floats."""
        return None

    def bias_room(self, part: int) -> Tensor:
        assert self.bias is not None
        return self.bias[self.begins[part] :][: self.parts[part]]

    def rows_at(self, rows: Tensor) -> Tensor:
        """Some rows as floats of `dtype`: (...) -> (..., columns)."""
        raise NotImplementedError

    def split(self, y: Tensor) -> list[Tensor]:
        """The output of each part."""
        return [y[..., begin : begin + rows] for begin, rows in zip(self.begins, self.parts, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        if not self.kernels or tracked(x):
            return self.stock(x)
        if x.numel() <= FEW * self.columns:
            return torch.ops.llama_mini.project(x, self.tensors, self.bias_or_nothing, self.width).to(x.dtype)
        return torch.ops.llama_mini.product(x, self.tensors, self.bias_or_nothing, self.width)

    def stock(self, x: Tensor) -> Tensor:
        """By PyTorch's own operators."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Matrix":
        super()._apply(fn, recurse)
        now = fn(torch.empty(0, dtype=self.dtype))
        self.dtype = now.dtype
        self.kernels &= served(now.dtype, now.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.columns} -> {' + '.join(map(str, self.parts))}, {self.name}"


class FloatMatrix(Matrix):
    """Rows of float32, bfloat16, ... as PyTorch has them."""

    name, block = "float", 1
    weight: Tensor

    def __init__(self, parts: Sequence[int], columns: int, dtype: torch.dtype, *rest: Any, **named: Any) -> None:
        super().__init__(parts, columns, dtype, *rest, **named)
        self.register_buffer("weight", torch.empty(self.rows, columns, dtype=dtype), persistent=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight]

    def put(self, part: int, weight: Tensor, first: int = 0) -> None:
        self.room(part, first, len(weight)).copy_(weight)

    def room(self, part: int, first: int, n: int) -> Tensor:
        return self.weight[self.begins[part] + first :][:n]

    def rows_at(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)

    def stock(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class CodedMatrix(Matrix):
    """Codes of 8 or 4 bits with float16 scales."""

    codes: Tensor
    scale: Tensor
    least: Tensor | None
    bits: ClassVar[int]

    def __init__(self, parts: Sequence[int], columns: int, dtype: torch.dtype, *rest: Any, **named: Any) -> None:
        super().__init__(parts, columns, dtype, *rest, **named)
        self.steps = -(-columns // STEP)
        blocks, vectors = self.rows // BLOCK, self.steps * self.bits
        self.register_buffer("codes", torch.empty(blocks, vectors, BLOCK, 4, dtype=torch.uint8), persistent=False)
        scales = torch.empty(blocks, self.steps, BLOCK, dtype=torch.float16)
        self.register_buffer("scale", scales, persistent=False)
        self.register_buffer("least", torch.empty_like(scales) if self.bits == 4 else None, persistent=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale] if self.least is None else [self.codes, self.scale, self.least]

    def put(self, part: int, weight: Tensor, first: int = 0) -> None:
        if self.kernels and served(weight.dtype, weight.device):
            self._check(torch.ops.llama_mini.quantize(weight.contiguous(), self.tensors, self._block(part, first)))
            return
        for begin in range(0, len(weight), _AT_ONCE):
            rows = weight[begin : begin + _AT_ONCE].float()
            if self.columns % STEP:
                rows = F.pad(rows, (0, self.steps * STEP - self.columns))
            self.put_codes(part, first + begin, *self.quantised(rows.view(len(rows), self.steps, -1)))

    def put_blocks(self, part: int, blocks: Blocks, first: int = 0) -> None:
        """Stores rows of a part from GGUF's blocks, whose codes stay as they are; `first` is a multiple of BLOCK."""
        if self.kernels:
            rows, block = blocks.rows.contiguous(), self._block(part, first)
            self._check(torch.ops.llama_mini.repack(rows, self.tensors, self.columns, block))
        else:
            self.put_codes(part, first, *blocks.codes())

    def quantised(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Steps of rows, (rows, steps, STEP) float32 -> codes (rows, columns) uint8, scale and least (rows, steps)."""
        raise NotImplementedError

    def put_codes(self, part: int, first: int, codes: Tensor, scale: Tensor, least: Tensor | None) -> None:
        """Stores rows of a part, from a multiple of BLOCK on: codes (rows, columns), the others (rows, steps)."""
        self._check(all(bool(torch.isfinite(t).all()) for t in (scale, least) if t is not None))
        short = -len(codes) % BLOCK  # the last block of a part is filled with zeros
        blocks = slice(self._block(part, first), self._block(part, first + len(codes) + short))
        quads = F.pad(codes, (0, 0, 0, short)).view(torch.int32)  # four codes move as one number
        vectors = self.packed(quads).unflatten(0, (-1, BLOCK)).transpose(1, 2)
        self.codes[blocks].view(torch.int32).copy_(vectors[..., None])
        for store, values in ((self.scale, scale), (self.least, least)):
            if store is not None and values is not None:
                store[blocks] = F.pad(values, (0, 0, 0, short)).unflatten(0, (-1, BLOCK)).transpose(1, 2)

    def _block(self, part: int, row: int) -> int:
        return (self.begins[part] + row) // BLOCK

    def _check(self, finite: bool) -> None:
        if not finite:
            raise CheckpointFormatError(f"a matrix of {self.columns} columns holds numbers that {self.name} cannot")

    def packed(self, quads: Tensor) -> Tensor:
        """Codes as bytes, four of them an int32: (rows, quads) -> (rows, vectors)."""
        return quads

    def unpacked(self, vectors: Tensor) -> Tensor:
        """The quads of `packed`, four bytes each: (n, vectors, 4) -> (n, quads, 4)."""
        return vectors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Matrix":
        scale, least = self.scale, self.least
        super()._apply(fn, recurse)
        self.scale = scale.to(self.codes.device)  # a new dtype is one of the input and the output, not of the scales
        self.least = None if least is None else least.to(self.codes.device)
        return self

    def rows_at(self, rows: Tensor) -> Tensor:
        if self.kernels:
            return torch.ops.llama_mini.rows(self.tensors, rows, self.columns, self.dtype)
        shape, rows = rows.shape, rows.flatten()
        block, row = rows // BLOCK, rows % BLOCK
        codes = self.unpacked(self.codes[block, :, row]).reshape(len(rows), self.steps, -1).float()
        scale = self.scale[block, :, row].float()[..., None]
        if self.least is None:
            values = (codes - 128) * scale
        else:
            values = codes * scale + self.least[block, :, row].float()[..., None]
        return values.flatten(1)[:, : self.columns].to(self.dtype).reshape(*shape, -1)

    def stock(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.width)
        for first in range(0, self.width, _WIDENED):
            rows = slice(first, min(first + _WIDENED, self.width))
            weight = self.rows_at(torch.arange(rows.start, rows.stop, device=x.device))
            y[..., rows] = F.linear(x, weight, None if self.bias is None else self.bias[rows])
        return y


class Int8Matrix(CodedMatrix):
    """scale · (code − 128), with a scale for 32 columns of a row, as GGUF's Q8_0 has."""

    name, bits = "int8", 8

    def quantised(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = (groups.abs().amax(-1) / 127).half()
        codes = (groups / _divisor(scale)).round_().clamp_(-127, 127).to(torch.int8)  # PyTorch is slow at uint8
        return codes.view(torch.uint8).add_(128).flatten(1), scale, None


class Int4Matrix(CodedMatrix):
    """scale · code + least, with one of each for 32 columns of a row, as GGUF's Q4_1 has. Two codes a byte."""

    name, bits = "int4", 4

    def quantised(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        least = groups.amin(-1).half()
        scale = ((groups.amax(-1) - least.float()) / 15).half()
        codes = (groups - least.float()[..., None]).div_(_divisor(scale)).round_().clamp_(0, 15).to(torch.int8)
        return codes.view(torch.uint8).flatten(1), scale, least

    def packed(self, quads: Tensor) -> Tensor:
        return quads[:, 0::2] | (quads[:, 1::2] << 4)

    def unpacked(self, vectors: Tensor) -> Tensor:
        return torch.stack((vectors & 15, vectors >> 4), 2)


def served(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the operators compute in this dtype, there."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def tracked(x: Tensor) -> bool:
    """Whether a gradient will flow back through x: the operators pass none."""
    return x.requires_grad and torch.is_grad_enabled()


def _divisor(scale: Tensor) -> Tensor:
    """A group of equal numbers has scale 0: its codes are 0 by any divisor."""
    return torch.where(scale == 0, math.inf, scale.float())[..., None]
