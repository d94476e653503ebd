"""Linear layers of one matrix, or of several that read the same input; here in float, quantized_linear.py has codes."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """y = x · [W0; W1; ...]ᵀ + b, for parts W0, W1, ... that all read x. Parts are filled by `load`.

    Args:
        parts: rows of each part.
        columns: width of the input.
        dtype: of the input and the output.
        kernels: whether torch.ops.llama_mini may be used.

    Shape: (..., columns) -> (..., width); the output of part i begins at `offsets[i]`.
    """

    name: str
    block_rows: ClassVar[int] = 1  # each part begins at a multiple of it

    def __init__(
        self, parts: Sequence[int], columns: int, dtype: torch.dtype, kernels: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.parts, self.columns, self.dtype, self.kernels = parts, columns, dtype, kernels
        sizes = [-(-rows // self.block_rows) * self.block_rows for rows in parts]
        self.offsets = [sum(sizes[:i]) for i in range(len(parts))]
        self.rows = sum(sizes)
        self.width = self.rows if len(parts) > 1 else parts[0]
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(self.width, dtype=dtype) if bias else None, persistent=False)

    @property
    def matrices(self) -> list["PackedLinear"]:
        """The matrices as the operators take them, each in one format."""
        return [self]

    @property
    def tensors(self) -> list[Tensor]:
        """The weights as the operators take them."""
        raise NotImplementedError

    @property
    def bias_or_empty(self) -> Tensor:
        """The bias as the operators take it: an empty tensor where there is none."""
        return torch.empty(0, dtype=self.dtype, device=self.tensors[0].device) if self.bias is None else self.bias

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    def load(self, part: int, weight: Tensor, first: int = 0) -> None:
        """Stores float rows of a part, (rows, columns), from row `first` on, a multiple of `block_rows`.

        Raises CheckpointFormatError for a number that the format cannot hold.
        """
        raise NotImplementedError

    def destination(self, part: int, first: int, n: int) -> Tensor | None:
        """The memory of n rows of a part, from row `first` on; None where weights are not stored as floats."""
        return None

    def bias_destination(self, part: int) -> Tensor:
        assert self.bias is not None
        return self.bias[self.offsets[part] :][: self.parts[part]]

    def lookup(self, rows: Tensor) -> Tensor:
        """Rows of the matrix as floats of `dtype`: indices (...) -> (..., columns)."""
        raise NotImplementedError

    def split(self, y: Tensor) -> list[Tensor]:
        """The output of each part."""
        return [y[..., begin : begin + rows] for begin, rows in zip(self.offsets, self.parts, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        if not self.kernels or needs_grad(x):
            return self.forward_torch(x)
        if decodes(x):
            return torch.ops.llama_mini.gemv(x, self.tensors, self.bias_or_empty, self.width).to(x.dtype)
        return torch.ops.llama_mini.gemm(x, self.tensors, self.bias_or_empty, self.width)

    def forward_torch(self, x: Tensor) -> Tensor:
        """The same with PyTorch's own operators: without kernels, and where gradients are needed."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.tensors[0].device))
        self.dtype = moved.dtype
        self.kernels &= supported(moved.dtype, moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.columns} -> {' + '.join(map(str, self.parts))}, {self.name}"


class FloatLinear(PackedLinear):
    """Float weights, (rows, columns), as PyTorch stores them."""

    name = "float"
    weight: Tensor

    def __init__(self, parts: Sequence[int], columns: int, dtype: torch.dtype, *rest: Any, **named: Any) -> None:
        super().__init__(parts, columns, dtype, *rest, **named)
        self.register_buffer("weight", torch.empty(self.rows, columns, dtype=dtype), persistent=False)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight]

    def load(self, part: int, weight: Tensor, first: int = 0) -> None:
        self.destination(part, first, len(weight)).copy_(weight)

    def destination(self, part: int, first: int, n: int) -> Tensor:
        return self.weight[self.offsets[part] + first :][:n]

    def lookup(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)

    def forward_torch(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def decodes(x: Tensor) -> bool:
    """Whether x is one token, (C,), or tokens of any rows, (N, 1, C). Several of one row, (..., T, C), are of a prompt.

    gemv takes the ones, gemm the others, and the two round differently. The shape alone decides, so the bits of a token
    do not depend on how many others there are.
    """
    return x.dim() == 1 or x.shape[-2] == 1


def supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the operators compute in this dtype on this device."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def needs_grad(x: Tensor) -> bool:
    """Whether a gradient will flow through x. The operators have no backward pass."""
    return x.requires_grad and torch.is_grad_enabled()
