"""Text from token ids, one token at a time: whole characters only, and no part of a stop string."""

import codecs
from collections.abc import Collection

from llama_mini.tokenizer.tokenizer import Tokenizer


class DecodeStream:
    """Joined, the returned texts equal `tokenizer.decode` of all ids, up to the first stop string.

    It holds back the bytes of an incomplete character, and text that may be the beginning of a stop string.
    `stopped` is true after a stop string; push then returns "". A stop string that is complete within the first
    `min_tokens` tokens is text. A control token's text in a stop string also stands for that token.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Collection[str] = (), min_tokens: int = 0) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = list(stop)
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_space
        self._held = ""
        # A control token adds no text. In `_held` a lone surrogate, which decoded text never has, stands for it.
        self._marks: dict[int, str] = {}
        for text in stop:
            marked = text
            for content, token_id in tokenizer.special_tokens.items():
                if content in marked:
                    mark = self._marks.setdefault(token_id, chr(0xD800 + len(self._marks)))
                    marked = marked.replace(content, mark)
            if marked != text:
                self._stop.append(marked)
        self._unmarked = {ord(mark): None for mark in self._marks.values()}

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often "". Special tokens add nothing."""
        self._min_tokens -= 1
        return self._release(self._utf8.decode(self._tokenizer.token_bytes(token_id)), self._marks.get(token_id, ""))

    def flush(self) -> str:
        """What was held back, at the end of the tokens; U+FFFD for a character that was never completed."""
        text = self._release(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text.translate(self._unmarked)

    def _release(self, text: str, mark: str = "") -> str:
        if self.stopped:
            return ""
        if text and self._strip_space:
            self._strip_space = False
            text = text.removeprefix(" ")
        n_held, text = len(self._held), self._held + text + mark
        self._held = ""
        # A stop string that ends in what was held back was complete too early to count.
        found = (text.find(stop, max(0, n_held - len(stop) + 1)) for stop in self._stop)
        starts = [start for start in found if start >= 0]
        if starts and self._min_tokens < 0:
            self.stopped = True
            return text[: min(starts)].translate(self._unmarked)
        end = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[end:]
        return text[:end].translate(self._unmarked)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
