"""Keys and values in pages. A sequence has a list of pages and may share them; what is free is counted in pages."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from llama_mini.errors import CapacityError
from llama_mini.machine import format_bytes
from llama_mini.memory import SCALE_BYTES
from llama_mini.model.kv_cache import KVCache, LayerCache, whole_blocks
from llama_mini.model.llama import Llama

PAGE = 256  # positions: as many as the operators read from one page (PAGE_MULTIPLE in optimize/native/isa.h)
LEAST_PEAK = 1e-30  # the operators' too: below it all codes are zero


def pages_of(positions: int) -> int:
    """How many pages hold so many positions."""
    return -(-positions // PAGE)


class Pages:
    """Storage of `count` pages in every layer, and how many use each. A page without users is free.

    dtype: None: the model's; or int8, where a key or value of one head is D codes and their scale, a float32.
    On the CPU its memory is taken when a page is first written. Raises CapacityError if it cannot be reserved.
    """

    def __init__(self, model: Llama, count: int, dtype: torch.dtype | None = None) -> None:
        config, dtype = model.config, dtype or model.dtype
        width = config.head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
        shape = (count, config.n_layers, 2, config.n_kv_heads, PAGE, width)  # a page is in one piece
        self._storage = _zeros(shape, dtype, model.device)
        # Sliced once: slicing takes as long as a small layer.
        self.layers = [(layer[:, 0], layer[:, 1]) for layer in self._storage.unbind(1)]  # (pages, K, PAGE, D) each
        self.count, self.free = count, list(reversed(range(count)))
        self._users = [0] * count

    def take(self) -> int:
        """A free page, for one user."""
        page = self.free.pop()
        self._users[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page, with one user more."""
        self._users[page] += 1
        return page

    def give_back(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self.free.append(page)

    def has_one_user(self, page: int) -> bool:
        return self._users[page] == 1

    def copy(self, source: int, target: int, n: int) -> None:
        """Copies the first n positions of a page to another one."""
        self._storage[target, ..., :n, :] = self._storage[source, ..., :n, :]

    def zero(self, page: int, first: int) -> None:
        """Zeroes a page from position `first` on. PyTorch's attention reads what is masked, and 0 · NaN is NaN."""
        self._storage[page, ..., first:, :] = 0


class PagedTokens(KVCache):
    """The tokens of one forward pass, which `Llama.hidden` takes as a cache of as many rows.

    They are (N, 1), tokens of any sequences, or (1, T), consecutive ones of one sequence. Several of the N may be of
    one sequence: all keys and values are written before any token attends.
    """

    def __init__(self, pages: Pages, rows: Sequence[list[int]], positions: Sequence[Sequence[int]]) -> None:
        device = pages.layers[0][0].device
        most = max(map(len, rows))
        padded = [row if len(row) == most else [*row, *row[-1:] * (most - len(row))] for row in rows]
        self._storage, self._pages = pages.layers, torch.tensor(padded, device=device)
        self._positions = torch.tensor(positions, device=device)
        self._end = max(row[-1] for row in positions) + 1

    @property
    def batch(self) -> int:
        return len(self._pages)

    def positions(self, n_new: int) -> Tensor:
        return self._positions

    def read_length(self, n_new: int) -> int:
        return whole_blocks(self._end)

    def layers(self, positions: Tensor) -> list[LayerCache]:
        return [PagedLayer(k, v, self._pages, positions) for k, v in self._storage]

    def advance(self, n_new: int) -> None:
        """Nothing: the owner of the pages counts what they hold."""


class PagedLayer(LayerCache):
    """One layer's pages, (pages, K, PAGE, D). PyTorch's attention gets a copy of those that it reads, in one piece."""

    __slots__ = ()

    def append(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        pages, at = self.pages.gather(1, self.positions // PAGE), self.positions % PAGE
        int8 = self.k.dtype == torch.int8
        self.k.transpose(1, 2)[pages, at] = to_codes(k) if int8 else k
        self.v.transpose(1, 2)[pages, at] = to_codes(v) if int8 else v
        k_all, v_all = self._read(self.k, length), self._read(self.v, length)
        return (from_codes(k_all, k.dtype), from_codes(v_all, v.dtype)) if int8 else (k_all, v_all)

    def _read(self, storage: Tensor, length: int) -> Tensor:
        pages = storage.transpose(0, 1)[:, self.pages[:, : pages_of(length)]]  # (K, B, n, PAGE, D)
        return pages.flatten(2, 3)[:, :, :length].transpose(0, 1)


def to_codes(x: Tensor) -> Tensor:
    """x (..., D) -> (..., D + 4) int8: codes and the bytes of their scale, peak / 127. The operators' own rounding."""
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True)
    codes = (x * torch.where(peak > LEAST_PEAK, peak.reciprocal() * 127, 0)).round().nan_to_num()
    return torch.cat([codes.to(torch.int8), (peak / 127).view(torch.int8)], -1)


def from_codes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_codes`, up to rounding. What was not finite is NaN."""
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-SCALE_BYTES].float() * scale).to(dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    n_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not n_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:  # NumPy asks the system for memory that is zero already; torch.zeros would write all of it
        return torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(dtype).view(shape)
    except MemoryError:
        raise CapacityError(f"the cache cannot reserve {format_bytes(n_bytes)} of address space") from None
