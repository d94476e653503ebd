"""Answers in the shapes of OpenAI's two APIs: whole, or as chunks of a stream."""

from collections.abc import Sequence
from typing import Any

from llama_mini.engine.request import Chunk, Request
from llama_mini.server.asked import Asked
from llama_mini.server.logprobs import Entry, TokenLogprobs, chat_logprobs, text_logprobs
from llama_mini.tokenizer import Tokenizer


class Answer:
    """One choice of a reply, as it grows: `n_tokens` so far. `index` is its place among the choices."""

    def __init__(self, index: int, asked: Asked, request: Request, tokenizer: Tokenizer) -> None:
        self.index, self.request = index, request
        self._asked, self._tokenizer = asked, tokenizer
        self._tokens = TokenLogprobs(tokenizer, len(self._prompt_text)) if asked.logprobs else None
        self.n_tokens = self._n_chars = 0

    @property
    def _prompt_text(self) -> str:
        """The prompt's text if it stands before the answer, else nothing."""
        return self._asked.echo[self.request.index] if self._asked.echo else ""

    def begin(self) -> dict[str, Any] | None:
        """The choice that a stream sends before the first token."""
        return None

    def choice(self, chunk: Chunk) -> dict[str, Any] | None:
        """The choice that a stream sends for a chunk; None if there is nothing to send."""
        raise NotImplementedError

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """The choice of a reply that is sent at once, from all chunks."""
        raise NotImplementedError

    def _entries(self, chunk: Chunk) -> list[Entry]:
        """The tokens whose log-probabilities are sent with a chunk."""
        request, n = self.request, self.n_tokens
        self.n_tokens += chunk.token_id is not None
        if self._tokens is None:
            return []
        self._n_chars += len(chunk.text)
        if chunk.token_id is not None:
            alternatives = request.top_logprobs[n] if request.params.top_logprobs else []
            self._tokens.push(chunk.token_id, request.logprobs[n], alternatives)
        if chunk.completion is None:
            return self._tokens.sent(self._n_chars)
        return self._tokens.rest(chunk.completion.text)


class ChatAnswer(Answer):
    """A choice of /v1/chat/completions."""

    def begin(self) -> dict[str, Any] | None:
        return self._choice({"role": "assistant", "content": None}, [], None)

    def choice(self, chunk: Chunk) -> dict[str, Any] | None:
        entries = self._entries(chunk)
        if not (chunk.text or entries or chunk.finish_reason):
            return None
        return self._choice({"content": chunk.text} if chunk.text else {}, entries, chunk.finish_reason)

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        entries = [entry for chunk in chunks for entry in self._entries(chunk)]
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": "".join(chunk.text for chunk in chunks), "refusal": None},
            "logprobs": chat_logprobs(self._tokenizer, entries) if self._asked.logprobs else None,
            "finish_reason": chunks[-1].finish_reason,
        }

    def _choice(self, delta: dict[str, Any], entries: list[Entry], finish_reason: str | None) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, entries) if entries else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class TextAnswer(Answer):
    """A choice of /v1/completions. With `echo` it begins with the prompt."""

    _begun = False

    def choice(self, chunk: Chunk) -> dict[str, Any] | None:
        text, entries = self._part(chunk)
        return self._choice(text, entries, chunk.finish_reason) if text or entries or chunk.finish_reason else None

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        parts = [self._part(chunk) for chunk in chunks]
        text, entries = "".join(text for text, _ in parts), [entry for _, each in parts for entry in each]
        return self._choice(text, entries, chunks[-1].finish_reason)

    def _part(self, chunk: Chunk) -> tuple[str, list[Entry]]:
        entries = self._entries(chunk)
        text, entries = ("", []) if self._asked.no_answer else (chunk.text, entries)
        if not self._begun:
            self._begun, text = True, self._prompt_text + text
            if self._asked.echo and self._asked.logprobs:
                entries = self._prompt_entries() + entries
        return text, entries

    def _prompt_entries(self) -> list[Entry]:
        request, tokens = self.request, TokenLogprobs(self._tokenizer)
        alternatives = request.prompt_top_logprobs if request.params.top_logprobs else [[] for _ in request.prompt]
        for token in zip(request.prompt, request.prompt_logprobs, alternatives, strict=True):
            tokens.push(*token)
        return tokens.rest(self._prompt_text)

    def _choice(self, text: str, entries: list[Entry], finish_reason: str | None) -> dict[str, Any]:
        logprobs = text_logprobs(self._tokenizer, entries) if self._asked.logprobs else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
