"""Prefix reuse: a prompt that begins like an earlier one copies the keys and values from that one's cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_mini.model.kv_cache import KVCache

MIN_PREFIX = 32  # tokens; a shorter prefix saves little time, and a prefill in two parts rounds differently from one


@dataclass(frozen=True)
class Prefix:
    """Token ids, and a cache of one row whose first positions hold them."""

    ids: list[int]
    cache: KVCache


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """The number of equal tokens at the start of two lists."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # Python compares slices in C, many times faster than a loop over the tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def reuse_prefix(prompt: list[int], prefixes: Sequence[Prefix], cache: KVCache) -> int:
    """Copies the longest prefix that a prompt shares with one of `prefixes` into an empty cache; returns its length.

    The last token of the prompt is never copied: it must run through the model, which gives the next token's logits.
    """
    lengths = [min(common_prefix_length(prompt, prefix.ids), len(prompt) - 1) for prefix in prefixes]
    longest = max(lengths, default=0)
    if longest < MIN_PREFIX:
        return 0
    cache.copy_from(prefixes[lengths.index(longest)].cache, longest)
    return longest
