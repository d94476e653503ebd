"""One request as it runs, and what comes out of it: chunks, a completion, statistics."""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llama_mini.engine.logprobs import token_logprobs, top_logprobs
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import LlamaMiniError
from llama_mini.machine import peak_memory_bytes
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.text_stream import TextStream

UNKNOWN_NEED = 256  # positions reserved at first for an answer without max_tokens; the cache doubles when they are full

FinishReason = Literal["stop", "length", "error", "abort"]
Alternatives = list[tuple[int, float]]  # token id and raw log-probability in nats, the likeliest first


@dataclass(frozen=True)
class Stats:
    """Times of one request. Rates are tokens per second of that row; None where too little ran to tell.

    `cached_tokens` of the prompt were taken over from another prompt, or from the last call, that begins with them.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    load_seconds: float
    ttft_seconds: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Completion:
    """What one prompt got.

    Attributes:
        text: without the end-of-text token and without the stop string.
        token_ids: every sampled token, the closing end-of-text included.
        finish_reason: `stop` (end of text, a stop string or token), `length` (tokens or time are used up), `error`
            or `abort`.
        error: what went wrong, or None.
        logprobs: raw log-probability of each token in nats.
        stats: times and rates.
        top_logprobs: at each token the likeliest ones; None unless asked for.
        prompt_logprobs: of each prompt token, None for the first; None unless asked for.
        prompt_top_logprobs: where both are asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None
    logprobs: list[float]
    stats: Stats
    top_logprobs: list[Alternatives] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[Alternatives | None] | None = None


@dataclass(frozen=True)
class Chunk:
    """One step of a stream: the text that became whole with this token, maybe none.

    The last chunk has a finish reason and the whole completion; its `token_id` is None if the row failed.
    """

    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


@dataclass(eq=False)
class Request:
    """The state of one row; `max_tokens` is what its parameters ask for, or all that the context leaves.

    `chunk` is the newest one; `index` is the place of the prompt among those of its call.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    tokenizer: Tokenizer
    load_seconds: float
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    prompt_top_logprobs: list[Alternatives | None] = field(default_factory=lambda: [None])
    chunk: Chunk = Chunk("", None)
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    failure: LlamaMiniError | None = None
    completion: Completion | None = None

    def __post_init__(self) -> None:
        self.generator = self.params.generator()
        self.ends = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self.ends |= self.tokenizer.eos_ids
        self._stream = TextStream(self.tokenizer, tuple(self.params.stop))
        self._texts: list[str] = []
        self._created = time.perf_counter()
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """The prefill begins."""
        self._started = time.perf_counter()

    @property
    def needed(self) -> int:
        """Positions to begin with: the prompt and every new token but the last, which is never fed back."""
        new = self.max_tokens if self.params.max_tokens is not None else min(self.max_tokens, UNKNOWN_NEED)
        return len(self.prompt) + new - 1

    def score_prompt(self, logits: Tensor) -> None:
        """Scores the next tokens of the prompt: logits (N, V) that predict them, after its last token for none."""
        start = len(self.prompt_logprobs)
        tokens = torch.tensor(self.prompt[start : start + len(logits)], dtype=torch.int64, device=logits.device)
        logits = logits[: len(tokens)]
        self.prompt_logprobs += token_logprobs(logits, tokens).tolist()
        if self.params.top_logprobs:
            self.prompt_top_logprobs += _alternatives(logits, self.params.top_logprobs)

    def accept(self, token: int, logits: Tensor) -> None:
        """Books a token and the raw logits (V,) that it was sampled from, and decides whether it is the last."""
        self.logprobs.append(float(token_logprobs(logits, torch.tensor(token, device=logits.device))))
        if self.params.top_logprobs:
            self.top_logprobs += _alternatives(logits[None], self.params.top_logprobs)
        self.chunk = self._booked(token)

    def _booked(self, token: int) -> Chunk:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.token_ids.append(token)
        if token in self.ends:
            return self._finish(token, "", "stop")
        text = self._stream.push(token)
        if self._stream.stopped:
            return self._finish(token, text, "stop")
        late = self.params.max_time is not None and self._last - self._started >= self.params.max_time
        if late or len(self.token_ids) == self.max_tokens:
            return self._finish(token, text, "length")
        self._texts.append(text)
        return Chunk(text, token)

    def fail(self, failure: LlamaMiniError) -> None:
        """Ends the row, and no other."""
        self.failure = failure
        self.chunk = self._finish(None, "", "error")

    def _finish(self, token: int | None, text: str, reason: FinishReason) -> Chunk:
        text += self._stream.flush()
        self._texts.append(text)
        self.finish_reason = "stop" if self._stream.stopped else reason
        params, error = self.params, None if self.failure is None else str(self.failure)
        self.completion = Completion(
            "".join(self._texts),
            self.token_ids,
            self.finish_reason,
            error,
            self.logprobs,
            self._stats(),
            self.top_logprobs if params.top_logprobs else None,
            self.prompt_logprobs if params.prompt_logprobs else None,
            self.prompt_top_logprobs if params.prompt_logprobs and params.top_logprobs else None,
        )
        return Chunk(text, token, self.finish_reason, self.completion)

    def _stats(self) -> Stats:
        new = len(self.token_ids)
        return Stats(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            new_tokens=new,
            load_seconds=self.load_seconds,
            ttft_seconds=self._first - self._created if new else None,
            prefill_tok_s=(len(self.prompt) - self.cached_tokens) / (self._first - self._started) if new else None,
            decode_tok_s=(new - 1) / (self._last - self._first) if new > 1 else None,
            peak_memory_bytes=peak_memory_bytes(),
        )


def _alternatives(logits: Tensor, k: int) -> list[Alternatives]:
    ids, logprobs = top_logprobs(logits, k)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), logprobs.tolist(), strict=True)]
