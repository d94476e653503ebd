"""Decoding token by token, for streaming."""

import codecs

from llama_mini.tokenizer.tokenizer import Tokenizer


class DecodeStream:
    """Joined, the pieces are `tokenizer.decode` of all ids: a character whose bytes are not all there is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = tokenizer.strips_space

    def push(self, token_id: int) -> str:
        """The whole characters that this token completes, or "". Special tokens give ""."""
        return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if not text or not self._strip_space:
            return text
        self._strip_space = False
        return text.removeprefix(" ")
