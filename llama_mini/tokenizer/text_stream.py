"""Token ids to text as they come: whole characters only, and never any part of a stop string."""

from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.stream import DecodeStream


class TextStream:
    """Turns tokens into text that can be shown at once; `stopped` is set when a stop string was met.

    What could be the beginning of a stop string is held back until it is clear that it is none.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = DecodeStream(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, at the end of the tokens."""
        text = self._release(self._decoder.flush()) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
