"""The key/value cache: preallocated rows, one for each sequence, each with its own length.

Lengths are kept twice: on the host, so that nothing waits for the device, and as a tensor, which the model uses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llama_mini.errors import CapacityError
from llama_mini.model.config import LlamaConfig

BLOCK = 16  # attention reads whole blocks, so that a row's bits do not depend on the other rows of its batch


class LayerCache(NamedTuple):
    """One layer's storage, and where to write the new tokens. Tensors only, so that a step can be exported."""

    k: Tensor  # (B, K, capacity, D)
    v: Tensor
    pages: Tensor  # (B, n): where the storage holds each row of the batch: a row of it, or n pages
    positions: Tensor  # (B, T)

    def append(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Writes k and v (B, T, K, D) at `positions`; returns the first `length` positions, each (B, K, S, D)."""
        self.k.transpose(1, 2)[self.pages, self.positions] = k
        self.v.transpose(1, 2)[self.pages, self.positions] = v
        return self.k[:, :, :length], self.v[:, :, :length]


class KVCache:
    """Keys and values of `batch` rows for up to `length` positions each, in every layer.

    Storage is (L, B, K, capacity, D) and starts as zeros: attention multiplies masked positions by zero, and 0 · NaN is
    NaN. `clear` a row that failed before you reuse it, for the same reason.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or length < 1:
            raise CapacityError(f"a cache needs at least one row and one position, not {batch} and {length}")
        shape = (config.n_layers, batch, config.n_kv_heads, whole_blocks(length), config.head_dim)
        self.length = length
        self._k = torch.zeros(shape, dtype=dtype, device=device)
        self._v = torch.zeros(shape, dtype=dtype, device=device)
        self._layers: list[tuple[Tensor, Tensor]] | None = None
        self._host_lengths = torch.zeros(batch, dtype=torch.int64, device="cpu")
        self._lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        return len(self._host_lengths)

    @property
    def lengths(self) -> list[int]:
        """Filled positions of each row."""
        return self._host_lengths.tolist()

    def positions(self, n_new: int) -> Tensor:
        """Positions of the next `n_new` tokens in each row: (B, T) int64. Raises CapacityError if they do not fit."""
        filled = max(self.lengths)
        if filled + n_new > self.length:
            raise CapacityError(
                f"the cache holds {self.length} positions: {filled} are filled, {n_new} more do not fit"
            )
        return self._lengths[:, None] + torch.arange(n_new, device=self._lengths.device)

    def read_length(self, n_new: int) -> int:
        """How many positions attention reads once `n_new` tokens are added: the longest row's, in whole blocks."""
        return whole_blocks(max(self.lengths) + n_new)

    def layers(self, positions: Tensor) -> list[LayerCache]:
        """Each layer's storage, ready for the tokens at `positions`."""
        if self._layers is None:  # sliced once: slicing takes as long as a small layer
            self._layers = list(zip(self._k, self._v, strict=True))
        rows = torch.arange(self.batch, device=positions.device)[:, None]
        return [LayerCache(k, v, rows, positions) for k, v in self._layers]

    def advance(self, n_new: int) -> None:
        """Counts `n_new` tokens as filled in every row."""
        self._host_lengths += n_new
        self._lengths += n_new

    def truncate(self, row: int, length: int) -> None:
        """Shortens row `row` to its first `length` positions."""
        if not 0 <= length <= self.lengths[row]:
            raise CapacityError(f"row {row} holds {self.lengths[row]} positions and cannot be cut to {length}")
        self._host_lengths[row] = length
        self._lengths[row] = length

    def clear(self, row: int) -> None:
        """Empties a row and zeroes its storage."""
        self.truncate(row, 0)
        self._k[:, row] = 0
        self._v[:, row] = 0

    def row(self, index: int) -> "KVCache":
        """A view of one row, as a cache that shares the storage."""
        if not 0 <= index < self.batch:
            raise CapacityError(f"there is no row {index} in a cache of {self.batch}")
        view, rows = object.__new__(KVCache), slice(index, index + 1)
        view.length, view._layers = self.length, None
        view._k, view._v = self._k[:, rows], self._v[:, rows]
        view._host_lengths, view._lengths = self._host_lengths[rows], self._lengths[rows]
        return view


def whole_blocks(length: int) -> int:
    """A length rounded up to a multiple of BLOCK."""
    return -(-length // BLOCK) * BLOCK
