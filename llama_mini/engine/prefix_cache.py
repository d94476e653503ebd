"""Prompts that begin alike: what the cache holds of one serves the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_mini.model.kv_cache import KVCache

FEWEST = 32  # tokens worth taking over: fewer cost less than the rounding that they change


@dataclass(frozen=True)
class Prefix:
    """Token ids, and a cache of one row whose first positions hold them."""

    ids: Sequence[int]
    cache: KVCache

    def begun(self, n: int) -> "Prefix":
        """The first `n` tokens in storage of their own."""
        return Prefix(self.ids[:n], self.cache.copy(n))


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def take_over(prompt: Sequence[int], prefixes: Sequence[Prefix], cache: KVCache) -> int:
    """Fills an empty row with the longest beginning of a prompt that is at hand, and says how many tokens it has.

    The last token of the prompt never comes from there: its logits are what a prefill is for.
    """
    lengths = [min(shared(prompt, prefix.ids), len(prompt) - 1) for prefix in prefixes]
    longest = max(lengths, default=0)
    if longest < FEWEST:
        return 0
    cache.begin_as(prefixes[lengths.index(longest)].cache, longest)
    return longest
