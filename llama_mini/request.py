"""One request as it runs, and what comes out of it: chunks, a completion, statistics."""

import sys
import time
from dataclasses import dataclass, field
from typing import Literal

from llama_mini.sampling import SamplingParams
from llama_mini.text_stream import TextStream
from llama_mini.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "error", "abort"]


@dataclass(frozen=True)
class Stats:
    """Times of one request. Rates are tokens per second of that row; None where too little ran to tell."""

    prompt_tokens: int
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
        finish_reason: `stop` (end of text or a stop string), `length`, `error` or `abort`.
        error: what went wrong, or None.
        logprobs: raw log-probability of each token in nats.
        stats: times and rates.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None
    logprobs: list[float]
    stats: Stats


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
    """The state of one row; `max_tokens` is what its parameters ask for, or all that the context leaves."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    tokenizer: Tokenizer
    load_seconds: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    completion: Completion | None = None

    def __post_init__(self) -> None:
        self.generator = self.params.generator()
        self._stream = TextStream(self.tokenizer, tuple(self.params.stop))
        self._texts: list[str] = []
        self._created = time.perf_counter()
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """The prefill begins."""
        self._started = time.perf_counter()

    def accept(self, token: int, logprob: float) -> Chunk:
        """Books a sampled token and decides whether it is the last."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.tokenizer.eos_ids and not self.params.ignore_eos:
            return self._finish(token, "", "stop")
        text = self._stream.push(token)
        if self._stream.stopped:
            return self._finish(token, text, "stop")
        if len(self.token_ids) == self.max_tokens:
            return self._finish(token, text, "length")
        self._texts.append(text)
        return Chunk(text, token)

    def fail(self, error: str) -> Chunk:
        """Ends the row because its numbers are no longer numbers."""
        self.error = error
        return self._finish(None, "", "error")

    def _finish(self, token: int | None, text: str, reason: FinishReason) -> Chunk:
        text += self._stream.flush()
        self._texts.append(text)
        self.finish_reason = "stop" if self._stream.stopped else reason
        self.completion = Completion(
            "".join(self._texts), self.token_ids, self.finish_reason, self.error, self.logprobs, self._stats()
        )
        return Chunk(text, token, self.finish_reason, self.completion)

    def _stats(self) -> Stats:
        new = len(self.token_ids)
        return Stats(
            prompt_tokens=len(self.prompt),
            new_tokens=new,
            load_seconds=self.load_seconds,
            ttft_seconds=self._first - self._created if new else None,
            prefill_tok_s=len(self.prompt) / (self._first - self._started) if new else None,
            decode_tok_s=(new - 1) / (self._last - self._first) if new > 1 else None,
            peak_memory_bytes=peak_memory_bytes(),
        )


def peak_memory_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
