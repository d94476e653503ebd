"""Checks that several settings share, and how wrong values and names are shown in a message."""

from collections.abc import Iterable
from typing import Any

_MOST_NAMES = 12


def is_whole(value: Any) -> bool:
    """A whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """A number that is finite as a float too: a whole number of 400 digits is not."""
    return (is_whole(value) or isinstance(value, float)) and abs(value) < 1e300


def short_repr(value: Any) -> str:
    """A value for a message, cut short; Python refuses to print a number of thousands of digits at all."""
    if is_whole(value) and abs(value) >= 10**60:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # such a number inside a list
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def join_names(names: Iterable[Any]) -> str:
    """Names for a message, the first dozen, each cut short: a checkpoint may hold any number of any length."""
    all_names = [str(name) for name in names]
    short = [name if len(name) <= 160 else name[:157] + "..." for name in all_names[:_MOST_NAMES]]
    more = len(all_names) - len(short)
    return ", ".join(short) + (f" and {more} more" if more else "")
