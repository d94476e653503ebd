"""What the backends of `Tokenizer` have in common: pieces of text to ids, and an id to its bytes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol
from unicodedata import category

Piece = str | int  # plain text, or the id of a control token


class Backend(Protocol):
    """A vocabulary. Its `encode` makes control tokens only of pieces that are ids, never of text."""

    vocab_size: int  # the highest id plus one
    control_ids: Mapping[str, int]  # content -> id; a chat template may write these tokens, a text may not
    special_ids: frozenset[int]  # decoding leaves them out
    frame: tuple[list[int], list[int]]  # the ids that the checkpoint's rule puts before and after a text
    names: Mapping[str, str]  # named special tokens that the vocabulary itself knows: "bos_token" -> "<s>"
    eos_ids: frozenset[int]  # ids that end a text, as far as the vocabulary itself knows them
    strips_space: bool  # decoding drops the space at the start that encoding added

    def encode(self, pieces: Sequence[Piece]) -> list[int]: ...

    def token_id(self, content: str) -> int | None:
        """The id of a token by its name, such as "</s>"."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, perhaps a part of a character; empty for an id without a token."""
        ...


def is_control(content: str, special: bool) -> bool:
    """Whether an added token is a control token, which text never becomes.

    `<think>` and `<|User|>` are, though many files do not mark them as special. Some vocabularies add runs of spaces,
    words and single characters; these are text.
    """
    kinds = {category(char)[0] for char in content.replace("▁", "")}  # letters, marks, numbers, separators are LMNZ
    is_text = content.isspace() or kinds <= set("LMNZ") or (len(content) == 1 and "C" not in kinds)
    return special or not is_text


def any_of(contents: Iterable[str], conditions: Mapping[str, str] = MappingProxyType({})) -> str:
    """A pattern for any of the contents, the longest first, each after its condition; no contents match nothing."""
    longest_first = sorted(contents, key=len, reverse=True)
    return "|".join(conditions.get(content, "") + re.escape(content) for content in longest_first) or "(?!)"


@contextmanager
def native_failures_as(error: type[Exception], doing: str) -> Iterator[None]:
    """Turns what a native library raises into `error`. Rust's PanicException is not an Exception."""
    try:
        yield
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise
        raise error(f"{doing} failed: {failure}") from failure
