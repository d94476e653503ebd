"""Checks of settings, and how wrong values and names appear in a message.

Each check takes the name of the setting as the user knows it, the value, and the error to raise. A message says which
setting, what was expected and what was found: `top_p must be a finite number from 0 to 1, not 1.5`.
"""

import codecs
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

from llama_mini.errors import LlamaMiniError, warn

_MAX_NAMES = 12


def check_whole(
    name: str, value: Any, error: type[LlamaMiniError], minimum: int = 1, maximum: float = math.inf, why: str = ""
) -> None:
    """Refuses anything but a whole number from `minimum` to `maximum`, both included; `why` explains a limit."""
    if not is_whole(value) or not minimum <= value <= maximum:
        raise error(f"{name} must be a whole number{_range(minimum, maximum)}{why}, not {short_repr(value)}")


def check_number(
    name: str,
    value: Any,
    error: type[LlamaMiniError],
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
) -> None:
    """Refuses anything but a finite number from `minimum` to `maximum`, both included, and greater than `above`."""
    if not is_finite(value) or not (minimum <= value <= maximum and value > above):
        limits = _range(minimum, maximum) if above == -math.inf else f" above {above:g}"
        raise error(f"{name} must be a finite number{limits}, not {short_repr(value)}")


def check_flag(name: str, value: Any, error: type[LlamaMiniError]) -> None:
    if not isinstance(value, bool):
        raise error(f"{name} must be true or false, not {short_repr(value)}")


def check_choice(name: str, value: Any, known: Collection[str], error: type[LlamaMiniError]) -> None:
    if not isinstance(value, str) or value not in known:
        raise error(f"unknown {name} {short_repr(value)}; known: {', '.join(known)}")


def compile_pattern(name: str, pattern: str, error: type[LlamaMiniError], repetitions: int) -> re.Pattern[str]:
    """A regular expression that a checkpoint holds. Refuses broken ones, and those that could take forever to match."""
    if len(pattern) > 10_000 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > repetitions:
        raise error(f"{name}: {short_repr(pattern)} repeats too much; give names or patterns with few *")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as problem:
        raise error(f"{name}: {short_repr(pattern)} is a broken pattern: {problem}; correct it") from None


def warn_unknown(where: str, names: Iterable[str]) -> None:
    if unknown := sorted(names):
        warn(f"{where}: unknown {join_names(unknown)} ignored")


def check_token_ids(ids: Iterable[int], vocab_size: int, error: type[LlamaMiniError]) -> None:
    """Refuses ids that are no rows of the embedding."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise error(f"token id {short_repr(token_id)} is outside the vocabulary of {vocab_size}")


def as_dict(what: str, pairs: Iterable[tuple[Any, Any]], error: type[LlamaMiniError]) -> dict[Any, Any]:
    """The pairs as a dict. Refuses a name with two values, of which a dict would silently keep the last."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise error(f"{what}: {short_repr(name)} is given twice")
        found[name] = value
    return found


def as_plain(value: Any) -> Any:
    """A number or an array of NumPy, PyTorch or pandas as Python's numbers and lists; any other value as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_text(data: bytes, name: object, error: type[LlamaMiniError]) -> str:
    """UTF-8 as text, without a byte order mark."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # a UTF-32 file of one order begins like the first
        raise error(f"{name} is UTF-16 or UTF-32 text: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{name} is not UTF-8 text: {problem.reason} at byte {problem.start}; save it as UTF-8") from None


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number. True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_token(value: Any) -> bool:
    return is_whole(value) and value >= 0


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold. A whole number of 400 digits is not."""
    return (is_whole(value) or isinstance(value, float)) and abs(value) < 1e300


def short_repr(value: Any) -> str:
    """A value for a message, cut short. Python refuses to print numbers of thousands of digits."""
    if is_whole(value) and abs(value) >= 10**60:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value[:100] if isinstance(value, str | bytes) else value)
    except ValueError:  # one of those numbers inside a list
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def join_names(names: Iterable[Any]) -> str:
    """The first dozen names for a message, each cut short: a checkpoint may hold any number of them, of any length."""
    all_names = [str(name) for name in names]
    short = [name if len(name) <= 160 else name[:157] + "..." for name in all_names[:_MAX_NAMES]]
    more = len(all_names) - len(short)
    return ", ".join(short) + (f" and {more} more" if more else "")


def _range(minimum: float, maximum: float) -> str:
    if minimum == -math.inf:
        return ""
    return f" of at least {minimum}" if maximum == math.inf else f" from {minimum} to {maximum}"
