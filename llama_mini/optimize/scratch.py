"""Room for one widened matrix, shared by all matrices of a model."""

import threading

import torch
from torch import Tensor

_ELEMENTS = 8 * 2**20  # 16 MiB in bfloat16: what a processor's outer cache holds, or nearly
_MULTIPLE = 256


class Scratch(threading.local):
    """One buffer in each thread that asks, kept: fresh memory would cost a page fault for every 4 KiB of it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __reduce__(self) -> tuple[type["Scratch"], tuple[()]]:
        return Scratch, ()  # a copied model has room of its own

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(rows, columns), uninitialised, until the next call."""
        n = rows * columns
        if self._buffer.numel() < n or self._buffer.dtype != dtype:
            self._buffer = torch.empty(n, dtype=dtype)
        return self._buffer[:n].view(rows, columns)

    def rows(self, columns: int) -> int:
        """How many rows are widened at once."""
        return max(_MULTIPLE, _ELEMENTS // columns // _MULTIPLE * _MULTIPLE)
