"""What the three vocabularies have in common: pieces in, ids out, and the bytes behind an id."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol
from unicodedata import category

Piece = str | int  # plain text, or the id of a control token


class Backend(Protocol):
    """A vocabulary. Its `encode` makes a control token of an id alone, whatever a text holds."""

    vocab_size: int  # the highest id plus one
    control_ids: Mapping[str, int]  # content -> id: what a chat template may write and text may not
    special_ids: frozenset[int]  # what decoding leaves out
    frame: tuple[list[int], list[int]]  # the ids that the checkpoint's rule puts before and after a text
    names: Mapping[str, str]  # named special tokens that the vocabulary itself knows: "bos_token" -> "<s>"
    eos_ids: frozenset[int]  # those that it knows by itself
    strips_space: bool  # decoding drops one space at the start, which encoding put there

    def encode(self, pieces: Sequence[Piece]) -> list[int]: ...

    def token_id(self, content: str) -> int | None:
        """The id of a token by its name, such as "</s>"."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, possibly part of a character; none for a hole in the vocabulary."""
        ...


def is_control(content: str, special: bool) -> bool:
    """Whether an added token is out of reach for text.

    `<think>` and `<|User|>` are, though many files do not mark them special. Runs of spaces, words and single
    characters, which some vocabularies add, are text.
    """
    kinds = {category(char)[0] for char in content.replace("▁", "")}  # letters, marks, numbers, separators are LMNZ
    is_text = content.isspace() or kinds <= set("LMNZ") or (len(content) == 1 and "C" not in kinds)
    return special or not is_text


def any_of(contents: Iterable[str], conditions: Mapping[str, str] = MappingProxyType({})) -> str:
    """A pattern for any of the contents, the longest first; matches nothing when there are none."""
    longest_first = sorted(contents, key=len, reverse=True)
    return "|".join(conditions.get(content, "") + re.escape(content) for content in longest_first) or "(?!)"


@contextmanager
def native_failures_as(error: type[Exception], doing: str) -> Iterator[None]:
    """Turn what a native library raises into `error`, its PanicException too, which is no Exception."""
    try:
        yield
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise
        raise error(f"{doing} failed: {failure}") from failure
