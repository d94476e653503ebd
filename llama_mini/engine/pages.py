"""Keys and values in pages. A sequence has a list of pages and may share them; what is free is counted in pages.

Layers with a sliding window have pages of their own: of these a sequence keeps only those in its window. vLLM calls it
a hybrid KV cache.
"""

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from llama_mini.errors import CapacityError
from llama_mini.machine import format_bytes
from llama_mini.memory import PAGE, SCALE_BYTES, pages_of, window_positions
from llama_mini.model.kv_cache import KVCache, LayerCache, whole_blocks
from llama_mini.model.llama import Llama

LEAST_PEAK = 1e-30  # the operators' too: below it all codes are zero


class Pages:
    """Storage of `count` pages of one kind, and how many use each. A page without users is free.

    window: None: the pages of all layers that see every position; or that of the layers whose pages these are.
    dtype: None: the model's; or int8, where a key or value of one head is D codes and their scale, a float32.
    On the CPU its memory is taken when a page is first written. Raises CapacityError if it cannot be reserved.
    """

    def __init__(self, model: Llama, count: int, window: int | None = None, dtype: torch.dtype | None = None) -> None:
        config, dtype = model.config, dtype or model.dtype
        width = config.head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
        n_windowed = len(config.sliding_layers)
        n_layers = config.n_layers - n_windowed if window is None else n_windowed
        shape = (count, n_layers, 2, config.n_kv_heads, PAGE, width)  # a page is in one piece
        self._storage = _zeros(shape, dtype, model.device)
        # Sliced once: slicing takes as long as a small layer.
        self.layers = [(layer[:, 0], layer[:, 1]) for layer in self._storage.unbind(1)]  # (pages, K, PAGE, D) each
        self.count, self.window, self.free = count, window, list(reversed(range(count)))
        self._users = [0] * count
        self._context = config.max_seq_len
        self._most = self._context if window is None else min(self._context, window_positions(config))

    def needed(self, positions: int) -> int:
        """How many pages a sequence of so many positions has at a time, at most."""
        return pages_of(min(positions, self._most))

    @property
    def most_positions(self) -> int:
        """How many positions a sequence can have."""
        return self._context if self.count >= self.needed(self._context) else self.count * PAGE

    def first_seen(self, position: int) -> int:
        """The first page of a sequence that a token at this position sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window) // PAGE

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


class PagedCache:
    """The pages of all layers, in up to two kinds: for the layers that see every position, and for those with a window.

    Each kind has pages for `positions`, the second for `windowed` at most.
    """

    def __init__(self, model: Llama, positions: int, windowed: int, dtype: torch.dtype | None = None) -> None:
        config, sliding = model.config, model.config.sliding_layers
        counts: dict[int | None, int] = {} if len(sliding) == config.n_layers else {None: positions // PAGE}
        if sliding:
            counts[config.sliding_window] = min(positions, windowed) // PAGE
        self.kinds = [Pages(model, count, window, dtype) for window, count in counts.items()]
        kinds = [len(self.kinds) - 1 if i in sliding else 0 for i in range(config.n_layers)]
        layers = [iter(kind.layers) for kind in self.kinds]
        self.layers = [(*next(layers[kind]), kind) for kind in kinds]  # keys, values, and the number of their kind

    def sequence(self) -> "list[SequencePages]":
        """Lists of pages for a sequence, one of each kind, still empty."""
        return [SequencePages(kind) for kind in self.kinds]

    def usage(self, sequences: "Iterable[list[SequencePages]]") -> float:
        """The share of the pages that these sequences have; of the kind that is fuller."""
        used = [{page for each in lists for page in each.pages} for lists in zip(*sequences, strict=False)]
        shares = [len(pages) / max(kind.count, 1) for pages, kind in zip(used, self.kinds, strict=False)]
        return max(shares, default=0.0)


class SequencePages:
    """The pages of a sequence, of one kind: its pages from number `first` on. Those before it were given back."""

    __slots__ = ("first", "pages", "pool")

    def __init__(self, pool: Pages) -> None:
        self.pool, self.first, self.pages = pool, 0, list[int]()

    @property
    def end(self) -> int:
        return self.first + len(self.pages)

    @property
    def numbered(self) -> list[int | None]:
        """The pages from number 0 on; None: it was given back."""
        return [*[None] * self.first, *self.pages]

    def slide(self, position: int) -> None:
        """Gives back the pages that no token from this position on sees; never the last one."""
        first = min(self.pool.first_seen(position), self.end - 1)
        while self.first < first:
            page = self.pages.pop(0)
            if self.pool.has_one_user(page):  # that its request failed may show only when it is another's
                self.pool.zero(page, 0)
            self.pool.give_back(page)
            self.first += 1

    def grow(self, end: int) -> None:
        """Takes free pages up to number `end`, as far as there are any."""
        while self.end < end and self.pool.free:
            self.pages.append(self.pool.take())

    def take_over(self, numbered: Sequence[int | None], length: int) -> None:
        """Shares the pages of a sequence with the same first `length` tokens, as far as the tokens after them see."""
        self.first = self.pool.first_seen(length)
        self.pages = [self.pool.share(page) for page in numbered[self.first : pages_of(length)] if page is not None]

    def own_last(self, n: int) -> None:
        """Copies the first n positions of the last page to one of its own. There must be a free one."""
        shared = self.pages[-1]
        self.pages[-1] = self.pool.take()
        self.pool.copy(shared, self.pages[-1], n)
        self.pool.give_back(shared)

    def fork(self, length: int) -> "SequencePages":
        """The pages of a sequence with the same first `length` tokens. There must be a free page for the last one."""
        other = SequencePages(self.pool)
        other.take_over(self.numbered, length)
        if length % PAGE:
            other.own_last(length % PAGE)
        return other

    def zero(self, position: int) -> None:
        """Zeroes the pages from this position on."""
        for i in range(max(position // PAGE, self.first), self.end):
            self.pool.zero(self.pages[i - self.first], max(0, position - i * PAGE))

    def clear(self) -> None:
        for page in self.pages:
            self.pool.give_back(page)
        self.first, self.pages = 0, []


class PagedTokens(KVCache):
    """The tokens of one forward pass, which `Llama.hidden` takes as a cache of as many rows.

    They are (N, 1), tokens of any sequences, or (1, T), consecutive ones of one sequence. Several of the N may be of
    one sequence: all keys and values are written before any token attends.
    """

    def __init__(
        self, cache: PagedCache, rows: Sequence[list[SequencePages]], positions: Sequence[Sequence[int]]
    ) -> None:
        device = cache.layers[0][0].device
        kinds = zip(*rows, strict=True)
        self._storage, self._pages = cache.layers, [torch.tensor(_table(kind), device=device) for kind in kinds]
        self._positions = torch.tensor(positions, device=device)
        self._end = max(row[-1] for row in positions) + 1

    @property
    def batch(self) -> int:
        return len(self._positions)

    def positions(self, n_new: int) -> Tensor:
        return self._positions

    def read_length(self, n_new: int) -> int:
        return whole_blocks(self._end)

    def layers(self, positions: Tensor) -> list[LayerCache]:
        return [PagedLayer(k, v, self._pages[kind], positions) for k, v, kind in self._storage]

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


def _table(rows: Sequence[SequencePages]) -> list[list[int]]:
    """The pages of each row, from number 0 on and as many of each.

    One that the row does not have is another of its own: PyTorch's attention reads it and masks it, and in that of
    another row there may be NaN.
    """
    most = max(row.end for row in rows)
    return [
        row.pages
        if len(row.pages) == most
        else [*row.pages[:1] * row.first, *row.pages, *row.pages[-1:] * (most - row.end)]
        for row in rows
    ]


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
