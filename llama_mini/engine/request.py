"""A request while it runs, and its results: chunks, a completion, statistics."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llama_mini.engine.logprobs import token_logprobs, top_logprobs
from llama_mini.engine.pages import SequencePages
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.engine.structured import Constraint
from llama_mini.errors import LlamaMiniError
from llama_mini.machine import peak_memory_bytes
from llama_mini.tokenizer import DecodeStream, Tokenizer

FinishReason = Literal["stop", "length", "error", "abort"]
Alternatives = list[tuple[int, float]]  # token ids and raw log-probabilities in nats, the likeliest first


@dataclass(frozen=True)
class Stats:
    """Times of one request. Rates are its own tokens per second; None where too few tokens ran to measure.

    The first `cached_tokens` of the prompt were not prefilled, but copied from the cache of another prompt of the same
    call, or of the call before. Of the new tokens, `proposed_tokens` were guessed in advance, and `accepted_tokens`
    of these guesses were right.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    load_seconds: float
    ttft_seconds: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    peak_memory_bytes: int | None
    proposed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        text: without the end-of-text token and the stop string.
        token_ids: all sampled tokens, including the end-of-text token.
        finish_reason: `stop` (an end-of-text token, a stop string or a stop token), `length` (max_tokens, max_time or
            the end of the context), `error` or `abort`.
        error: the message if the request failed, else None.
        logprobs: log-probability of each token in nats, from the raw logits; empty without `token_logprobs`.
        stats: times and rates.
        top_logprobs: for each token the likeliest alternatives; None unless `SamplingParams.top_logprobs` is set.
        prompt_logprobs: for each token of the prompt, None for the first; None unless asked for.
        prompt_top_logprobs: the same with alternatives; None unless both are asked for.
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
    """One token of a stream, and the text that it completes.

    The text is empty while a character is incomplete or a stop string may have begun. The last chunk has the finish
    reason and the completion; its `token_id` is None if the request failed.
    """

    text: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


@dataclass(eq=False)
class Request:
    """One sequence while it is generated.

    Attributes:
        max_tokens: that of the parameters, else as many tokens as fit in the context after the prompt.
        index: position of the prompt in the list of its call.
        constraint: what the answer may be. All requests of the same structure share it until they start.
        deliver: takes each chunk when it is there, in the engine's thread.
        pages: the pages of the cache that hold its first `filled` tokens, one list for each kind.
        cancelled: nobody waits for it any more. Any thread may set it.
        crash: what was raised by code that is not the engine's, such as a hook of the model.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    tokenizer: Tokenizer
    load_seconds: float
    index: int = 0
    constraint: Constraint | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    prompt_top_logprobs: list[Alternatives | None] = field(default_factory=lambda: [None])
    deliver: Callable[["Request", Chunk], None] = lambda _request, _chunk: None
    pages: list[SequencePages] = field(default_factory=list)
    filled: int = 0
    cancelled: bool = False
    cached_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: FinishReason | None = None
    failure: LlamaMiniError | None = None
    crash: BaseException | None = None
    completion: Completion | None = None

    def __post_init__(self) -> None:
        self._stop_ids = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self._stop_ids |= self.tokenizer.eos_ids
        self._stream = DecodeStream(self.tokenizer, self.params.stop, self.params.min_tokens)
        self._texts: list[str] = []
        self._created_at = time.perf_counter()
        self._started_at = self._first_token_at = self._last_token_at = 0.0

    def start(self) -> None:
        """Records the time at which the prefill begins, and makes the random generator, 5 KB each."""
        if not self._started_at:  # else it was preempted, and goes on with what it has
            self._started_at = time.perf_counter()
            self.generator = self.params.generator()
            self.constraint = self.constraint and self.constraint.copy(self._stop_ids)

    @property
    def positions(self) -> int:
        """Cache positions for the prompt and all new tokens but the last, which is never an input."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def least_positions(self) -> int:
        """The same, with one new token if no number was given: a default shrinks."""
        return self.positions if self.params.max_tokens is not None else len(self.prompt)

    @property
    def new_inputs(self) -> list[int]:
        """Its new tokens that are not in the cache yet."""
        return self.token_ids[self.filled - len(self.prompt) :]

    def preempt(self) -> None:
        """Forgets what the cache holds; the tokens stay."""
        self.pages, self.filled = [], 0
        if not self.token_ids:
            self.prompt_logprobs, self.prompt_top_logprobs = [None], [None]

    def score_prompt(self, logits: Tensor) -> None:
        """Scores the next tokens of the prompt from the logits (N, V) that predict them.

        The logits after the last token of the prompt predict none of its tokens and are left out.
        """
        start = len(self.prompt_logprobs)
        tokens = torch.tensor(self.prompt[start : start + len(logits)], dtype=torch.int64, device=logits.device)
        logits = logits[: len(tokens)]
        self.prompt_logprobs += token_logprobs(logits, tokens).tolist()
        if self.params.top_logprobs:
            self.prompt_top_logprobs += _alternatives(logits, self.params.top_logprobs)

    def append_token(self, token: int, logits: Tensor) -> None:
        """Appends a token and its log-probability under the raw logits (V,); finishes after the last token."""
        if self.params.token_logprobs:
            self.logprobs.append(float(token_logprobs(logits, torch.tensor(token, device=logits.device))))
        if self.params.top_logprobs:
            self.top_logprobs += _alternatives(logits[None], self.params.top_logprobs)
        self._last_token_at = time.perf_counter()
        self._first_token_at = self._first_token_at or self._last_token_at
        self.token_ids.append(token)
        self._deliver(self._next_chunk(token))

    def _next_chunk(self, token: int) -> Chunk:
        if token in self._stop_ids:
            return self._finish(token, "", "stop")
        text = self._stream.push(token)
        complete = self.constraint is not None and self.constraint.accept(token)
        if self._stream.stopped or complete:
            return self._finish(token, text, "stop")
        elapsed = self._last_token_at - self._started_at
        timed_out = self.params.max_time is not None and elapsed >= self.params.max_time
        if timed_out or len(self.token_ids) == self.max_tokens:
            return self._finish(token, text, "length")
        self._texts.append(text)
        return Chunk(text, token)

    def fail(self, failure: LlamaMiniError) -> None:
        """Finishes this request with an error. Others of its batch go on."""
        self.failure = failure
        self._deliver(self._finish(None, "", "error"))

    def end(self, crash: BaseException | None = None) -> None:
        """Finishes this request as it is: nobody waits for it, or there was a crash."""
        self.crash = crash
        self._deliver(self._finish(None, "", "abort"))

    def raise_failure(self) -> None:
        """Raises the error with which it ended, if there was one."""
        if (error := self.crash or self.failure) is not None:
            raise error

    def _deliver(self, chunk: Chunk) -> None:
        try:
            self.deliver(self, chunk)
        except RuntimeError:  # the event loop of its caller is closed
            self.cancelled = True

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
        prefill_seconds = self._first_token_at - self._started_at
        return Stats(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            new_tokens=new,
            load_seconds=self.load_seconds,
            ttft_seconds=self._first_token_at - self._created_at if new else None,
            prefill_tok_s=(len(self.prompt) - self.cached_tokens) / prefill_seconds if new else None,
            decode_tok_s=(new - 1) / (self._last_token_at - self._first_token_at) if new > 1 else None,
            peak_memory_bytes=peak_memory_bytes(),
            proposed_tokens=self.proposed_tokens,
            accepted_tokens=self.accepted_tokens,
        )


def _alternatives(logits: Tensor, k: int) -> list[Alternatives]:
    ids, logprobs = top_logprobs(logits, k)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), logprobs.tolist(), strict=True)]
