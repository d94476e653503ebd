"""Text from token ids, one token at a time: whole characters only, and no part of a stop string."""

import codecs
from collections.abc import Sequence

from llama_mini.tokenizer.tokenizer import Tokenizer


class DecodeStream:
    """Joined, the returned texts equal `tokenizer.decode` of all ids, up to the first stop string.

    It holds back the bytes of an incomplete character, and text that may be the beginning of a stop string.
    `stopped` is true after a stop string; push then returns "".
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_space
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often "". Special tokens add nothing."""
        return self._release(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What was held back, at the end of the tokens; U+FFFD for a character that was never completed."""
        text = self._release(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if text and self._strip_space:
            self._strip_space = False
            text = text.removeprefix(" ")
        text, self._held = self._held + text, ""
        starts = [start for start in map(text.find, self._stop) if start >= 0]
        if starts:
            self.stopped = True
            return text[: min(starts)]
        end = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[end:]
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
