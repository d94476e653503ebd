"""Matrices that read the same input, in formats of their own: a Q4_K_M file has v in 6 bits beside q and k in 4."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.optimize.packed_linear import PackedLinear


class MixedLinear(PackedLinear):
    """Several `PackedLinear` of quantised weights, side by side. It loads nothing: they do.

    Shape: (..., columns) -> (..., width), their outputs one after another.
    """

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        nn.Module.__init__(self)
        self.linears, self.bias = nn.ModuleList(linears), None  # each has its own
        self.parts = [rows for linear in linears for rows in linear.parts]
        self.columns, self.width, self.offsets = linears[0].columns, 0, list[int]()
        for linear in linears:
            self.offsets += [self.width + offset for offset in linear.offsets]
            self.width += linear.width

    @property
    def matrices(self) -> list[PackedLinear]:
        return [*self.linears]

    @property
    def name(self) -> str:  # type: ignore[override]
        return " + ".join(linear.name for linear in self.matrices)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.matrices[0].dtype

    @property
    def kernels(self) -> bool:  # type: ignore[override]
        return all(linear.kernels for linear in self.matrices)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)
