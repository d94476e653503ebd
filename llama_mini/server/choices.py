"""Choices, the answers of a response, in the shapes of OpenAI's two APIs: complete, or as chunks of a stream."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from llama_mini.engine.request import Alternatives, Chunk, Request
from llama_mini.server.api_request import ApiRequest
from llama_mini.server.logprobs import Entry, TokenLogprobs, TokenNames, chat_logprobs, prompt_logprob, text_logprobs
from llama_mini.server.tool_calls import ToolCalls
from llama_mini.tokenizer import Tokenizer


class Choice:
    """One answer to a prompt, of `n_tokens` so far. `index` is its place among the choices of the response."""

    prefix: str  # of a response's id
    kind: str  # the `object` of a complete response
    chunk_kind: str  # that of each chunk of a stream

    def __init__(self, index: int, asked: ApiRequest, request: Request, tokenizer: Tokenizer) -> None:
        self.index, self.request = index, request
        self._asked, self._tokenizer = asked, tokenizer
        self._names = TokenNames(tokenizer, asked.ids_as_tokens)
        self._tokens = TokenLogprobs(tokenizer, len(self._prompt_text)) if asked.logprobs else None
        self.n_tokens = self._n_chars = 0
        self._new_ids: list[int] = []  # of tokens that were not sent

    @property
    def _prompt_text(self) -> str:
        """The prompt's text if it stands before the answer, else nothing."""
        return self._asked.echo[self.request.index] if self._asked.echo else ""

    def opening(self) -> dict[str, Any] | None:
        """The choice that a stream sends before the first token; None if there is none."""
        return None

    def extra_fields(self, streamed: bool) -> dict[str, Any]:
        """Fields that a complete response, or the first chunk of a stream, has besides its choices."""
        return {}

    def streamed(self, chunk: Chunk) -> dict[str, Any] | None:
        """The choice that a stream sends for a chunk; None if there is nothing to send."""
        raise NotImplementedError

    def complete(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """The choice of a response that is sent at once, from all chunks."""
        raise NotImplementedError

    def _entries(self, chunk: Chunk) -> list[Entry]:
        """The tokens whose log-probabilities are sent with a chunk."""
        request, n = self.request, self.n_tokens
        if chunk.token_id is not None:
            self.n_tokens += 1
            self._new_ids.append(chunk.token_id)
        if self._tokens is None:
            return []
        self._n_chars += len(chunk.text)
        if chunk.token_id is not None:
            alternatives = request.top_logprobs[n][: self._asked.n_top] if request.params.top_logprobs else []
            self._tokens.push(chunk.token_id, request.logprobs[n], alternatives)
        if chunk.completion is None:
            return self._tokens.sent(self._n_chars)
        return self._tokens.rest(chunk.completion.text)

    def _ids(self) -> dict[str, Any]:
        """The field with the ids of the tokens that are sent, if they are asked for."""
        ids, self._new_ids = self._new_ids, []
        return {"token_ids": ids} if self._asked.return_ids else {}

    def _prompt_logprobs(self) -> dict[str, Any]:
        if (n := self._asked.n_prompt_top) is None:
            return {"prompt_logprobs": None}
        return {"prompt_logprobs": [prompt_logprob(self._names, *token, n) for token in self._scored_prompt()]}

    def _scored_prompt(self) -> Iterator[tuple[int, float | None, Alternatives | None]]:
        """Each token of the prompt, its log-probability, and the likeliest tokens in its place."""
        request = self.request
        top = request.prompt_top_logprobs if request.params.top_logprobs else [[] for _ in request.prompt]
        return zip(request.prompt, request.prompt_logprobs, top, strict=True)


class ChatChoice(Choice):
    """A choice of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, index: int, asked: ApiRequest, request: Request, tokenizer: Tokenizer) -> None:
        super().__init__(index, asked, request, tokenizer)
        self._n_calls = 0
        self._calls = None if asked.tools is None else ToolCalls(asked.tools, tokenizer)
        self._mistral = asked.tools is not None and asked.tools.style == "mistral"

    def opening(self) -> dict[str, Any] | None:
        return self._choice({"role": "assistant", "content": self._prompt_text or None}, [], None)

    def extra_fields(self, streamed: bool) -> dict[str, Any]:
        prompt = {"prompt_token_ids": self.request.prompt} if self._asked.return_ids else {}
        return prompt if streamed else prompt | self._prompt_logprobs()

    def streamed(self, chunk: Chunk) -> dict[str, Any] | None:
        entries, delta = self._entries(chunk), self._delta(chunk)
        reason = self._reason(chunk)
        return self._choice(delta, entries, reason) if delta or entries or reason else None

    def complete(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        entries, text, calls = list[Entry](), self._prompt_text, list[dict[str, Any]]()
        for chunk in chunks:
            entries += self._entries(chunk)
            delta = self._delta(chunk)
            text += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: call[name] for name in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if self._calls is not None and self._calls.incomplete and calls:
            calls.pop()
            text += self._calls.incomplete
        message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        return {
            "index": self.index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": chat_logprobs(self._names, entries) if self._asked.logprobs else None,
            "finish_reason": self._reason(chunks[-1]),
            **self._ids(),
        }

    def _delta(self, chunk: Chunk) -> dict[str, Any]:
        """What a chunk adds to the message."""
        if self._calls is None:
            return {"content": chunk.text} if chunk.text else {}
        parts = self._calls.push(chunk.text, chunk.token_id)
        if chunk.finish_reason is not None:
            parts += self._calls.finish()
        delta: dict[str, Any] = {}
        for kind, text in parts:
            calls = [] if kind == "text" else delta.setdefault("tool_calls", [])
            if kind == "text":
                delta["content"] = delta.get("content", "") + text
            elif kind == "name":
                id = secrets.token_hex(5)[:9] if self._mistral else f"call_{secrets.token_hex(12)}"  # 9 in its template
                function = {"name": text, "arguments": ""}
                self._n_calls += 1
                calls.append({"index": self._n_calls - 1, "id": id, "type": "function", "function": function})
            elif calls:
                calls[-1]["function"]["arguments"] += text
            else:
                calls.append({"index": self._n_calls - 1, "function": {"arguments": text}})
        return delta

    def _reason(self, chunk: Chunk) -> str | None:
        complete = self._calls is not None and self._calls.n_calls > 0 and not self._calls.incomplete
        return "tool_calls" if complete and chunk.finish_reason is not None else chunk.finish_reason

    def _choice(self, delta: dict[str, Any], entries: list[Entry], finish_reason: str | None) -> dict[str, Any]:
        logprobs = chat_logprobs(self._names, entries) if entries else None
        choice = {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return choice | self._ids()


class TextChoice(Choice):
    """A choice of /v1/completions. With `echo` it begins with the prompt."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    _begun = _sent = False

    def streamed(self, chunk: Chunk) -> dict[str, Any] | None:
        text, entries = self._part(chunk)
        return self._choice(text, entries, chunk.finish_reason) if text or entries or chunk.finish_reason else None

    def complete(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        parts = [self._part(chunk) for chunk in chunks]
        text, entries = "".join(text for text, _ in parts), [entry for _, each in parts for entry in each]
        prompt = {"prompt_token_ids": None} | self._prompt_logprobs()
        return prompt | self._choice(text, entries, chunks[-1].finish_reason)

    def _part(self, chunk: Chunk) -> tuple[str, list[Entry]]:
        entries = self._entries(chunk)
        text = chunk.text
        if self._asked.no_answer:
            text, entries, self._new_ids = "", [], []
        if not self._begun:
            self._begun, text = True, self._prompt_text + text
            if self._asked.echo and self._asked.logprobs:
                entries = self._prompt_entries() + entries
        return text, entries

    def _prompt_entries(self) -> list[Entry]:
        with_special = self._tokenizer.decode(self.request.prompt, skip_special_tokens=False)
        tokens = TokenLogprobs(self._tokenizer, skip_special=self._prompt_text != with_special)
        for id, logprob, likeliest in self._scored_prompt():
            tokens.push(id, logprob, None if likeliest is None else likeliest[: self._asked.n_top])
        return tokens.rest(self._prompt_text)

    def _choice(self, text: str, entries: list[Entry], finish_reason: str | None) -> dict[str, Any]:
        logprobs = text_logprobs(self._names, entries) if self._asked.logprobs else None
        choice = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        first = self._asked.return_ids and not self._sent
        self._sent = True
        return choice | self._ids() | ({"prompt_token_ids": self.request.prompt} if first else {})
