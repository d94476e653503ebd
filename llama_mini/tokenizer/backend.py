"""What the backends of `Tokenizer` share: added tokens in a text, pieces of text to ids, an id to its bytes."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from unicodedata import category

import tokenizers

from llama_mini.errors import RequestError
from llama_mini.tokenizer.config_files import AddedToken

LONG = 10_000  # characters, which take 5 ms
Piece = str | int  # plain text, or the id of a control token


class Backend(Protocol):
    """A vocabulary. Its `encode` makes tokens of `control_ids` only of pieces that are ids, never of text."""

    vocab_size: int  # the highest id plus one
    control_ids: Mapping[str, int]  # content -> id, of special tokens and of words that look like markers
    added: "AddedTokens"  # finds these tokens in a text
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


@dataclass(frozen=True)
class Found:
    """An added token in a text: its content without the white space that lstrip and rstrip take."""

    content: str
    start: int
    end: int


class AddedTokens:
    """The added tokens of a vocabulary: special ones, and words of the language.

    The library applies single_word, lstrip, rstrip and normalized, and takes the longest of several. Its model here has
    no vocabulary, so that it finds added tokens alone. `normalizer` is the library's, for the tokens that need it.
    """

    def __init__(self, tokens: Iterable[AddedToken], normalizer: Any = None) -> None:
        every = list({token.content: token for token in tokens}.values())
        words = [token for token in every if not token.special]
        self._tokens = {True: every, False: words}
        self._finders = {special: _finder(some, normalizer) for special, some in self._tokens.items()}

    def find(self, text: str, special: bool) -> Iterator[Found]:
        """The words in a text, from left to right; with `special`, the special tokens too."""
        tokens = self._tokens[special]
        if not tokens:
            return
        with native_failures_as(RequestError, "encoding a text"):
            found = encoding_of(self._finders[special], text)
            matches = list(zip(found.ids, found.offsets, strict=True))
        for index, (start, end) in matches:
            content, match = tokens[index].content, text[start:end]
            shown = content if content in match else match.strip() or match  # its normalized form may be the content
            start += match.index(shown)
            yield Found(content, start, start + len(shown))


def _finder(tokens: list[AddedToken], normalizer: Any) -> tokenizers.Tokenizer:
    finder = tokenizers.Tokenizer(tokenizers.models.BPE())
    if normalizer is not None and any(token.normalized for token in tokens):
        finder.normalizer = normalizer
    finder.add_tokens(list(map(of_library, tokens)))
    return finder


def encoding_of(encoder: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """The encoding of a text. While a long one is encoded, other threads run: a batch does not hold Python's lock."""
    if len(text) < LONG:  # a batch starts threads, of which a forked process would be warned
        return encoder.encode(text, add_special_tokens=False)
    return encoder.encode_batch([text], add_special_tokens=False)[0]


def of_library(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(**{name: value for name, value in asdict(token).items() if name != "id"})


def split(text: str, found: Iterable[Found], ids: Mapping[str, int]) -> list[Piece]:
    """The text in pieces: each token that was found becomes its id, if `ids` has it."""
    pieces: list[Piece] = []
    end = 0
    for token in found:
        if token.content in ids:
            pieces += [text[end : token.start], ids[token.content]]
            end = token.end
    return [piece for piece in (*pieces, text[end:]) if piece != ""]


def encode_each(pieces: Sequence[Piece], encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of pieces, where `encode` gives those of one text."""
    ids: list[int] = []
    with native_failures_as(RequestError, "encoding a text"):
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else encode(piece)
    return ids


def check_text(text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"a text is a {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r}, at character {error.start}"
        raise RequestError(f"a text holds half a surrogate pair, {half}; remove it") from error


def is_control(content: str, special: bool) -> bool:
    """Whether an added token is special or a word that looks like a marker, which a user's message never becomes.

    `<think>` and `<|User|>` are, though many files do not mark them as special. Some vocabularies add runs of spaces,
    words and single characters; these are text.
    """
    kinds = {category(char)[0] for char in content.replace("▁", "")}  # letters, marks, numbers, separators are LMNZ
    is_text = content.isspace() or kinds <= set("LMNZ") or (len(content) == 1 and "C" not in kinds)
    return special or not is_text


def any_of(contents: Iterable[str]) -> str:
    """A pattern for any of the contents, the longest first; no contents match nothing."""
    return "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)"


@contextmanager
def native_failures_as(error: type[Exception], doing: str) -> Iterator[None]:
    """Turns what a native library raises into `error`. Rust's PanicException is not an Exception."""
    try:
        yield
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise
        raise error(f"{doing} failed: {failure}") from failure
