"""SamplingParams: what one request asks of the sampler and when it ends, checked when it is made."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.validate import check_flag, check_number, check_token_ids, check_whole, is_finite, is_whole, short_repr

LogitsProcessor = Callable[[list[int], Tensor], Tensor]

MAX_BIAS = 1e30  # float32 holds it beside any logit, and no other logit comes near
MAX_SEQUENCES = 16384
MAX_LOGPROBS = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample and when to stop. The default is greedy, to the end of the text or of the context.

    The logits pass through what is asked for in this order, which is that of transformers: logit_bias,
    repetition_penalty, presence_penalty and frequency_penalty, min_tokens, logits_processors; then temperature, top_k,
    top_p, min_p. Greedy takes the likeliest token after the processors.

    Args:
        temperature: divides the logits; 0 is greedy, and the three below then change nothing.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keeps tokens at least this share as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides the positive logits of tokens in prompt and answer, multiplies the negative ones.
        presence_penalty: taken off the logit of every token in the answer so far; -2 to 2.
        frequency_penalty: the same once for each time that the token occurred; -2 to 2.
        logit_bias: added to the logits of these token ids; -inf bans one.
        logits_processors: functions of the token ids so far, prompt included, and the logits (V,) float32; each
            returns the logits to go on with, -inf where a token is banned.
        n: answers to each prompt.
        seed: of this request's own generator; None draws one.
        min_tokens: new tokens before which neither an end-of-text token nor one of stop_token_ids is sampled.
        max_tokens: new tokens at most; None goes to the context's end.
        max_time: seconds after which the answer is cut; None never cuts.
        stop: strings that end the text; neither they nor what follows them is returned.
        stop_token_ids: tokens that end the text as an end-of-text token does.
        ignore_eos: goes on past the end-of-text tokens.
        top_logprobs: so many likeliest tokens at each step come back with their log-probabilities.
        prompt_logprobs: the log-probability of every prompt token comes back too.

    Raises:
        RequestError: names the parameter, what was given and what is possible.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    n: int = 1
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    max_time: float | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, RequestError, 0)
        for name in ("top_p", "min_p"):
            check_number(name, getattr(self, name), RequestError, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, RequestError, above=0)
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), RequestError, -2, 2)
        for name in ("top_k", "min_tokens"):
            check_whole(name, getattr(self, name), RequestError, 0)
        check_whole("n", self.n, RequestError, 1, MAX_SEQUENCES)
        check_whole("top_logprobs", self.top_logprobs, RequestError, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "prompt_logprobs"):
            check_flag(name, getattr(self, name), RequestError)
        if self.seed is not None:
            check_whole("seed", self.seed, RequestError, 0, 2**64 - 1)
        if self.max_time is not None:
            check_number("max_time", self.max_time, RequestError, above=0)
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, RequestError)
            if self.min_tokens > self.max_tokens:
                limits = f"{short_repr(self.max_tokens)}, not {short_repr(self.min_tokens)}"
                raise RequestError(f"min_tokens must be at most max_tokens, {limits}")
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_ids(self.stop_token_ids))
        self._set("logits_processors", _functions(self.logits_processors))
        self._set("logit_bias", None if self.logit_bias is None else _Biases(self.logit_bias))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def generator(self) -> torch.Generator:
        """A new random generator for one request."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    @cached_property
    def changes_logits(self) -> bool:
        """Whether anything before the temperature is asked for."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.logits_processors
        )


def check_vocab(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError for a token id that the model does not have."""
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        try:
            check_token_ids(ids, vocab_size, RequestError)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None


class _Biases(Mapping[int, float]):
    """A checked copy of token id -> bias that stays as it is; unlike MappingProxyType it hashes, copies and pickles."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        if not isinstance(biases, Mapping):
            raise RequestError(f"logit_bias must be a dict of token id to number, not {short_repr(biases)}")
        for token, bias in biases.items():
            if not _is_token(token):
                raise RequestError(f"logit_bias must have token ids, whole numbers from 0 up, not {short_repr(token)}")
            if not _is_bias(bias):
                raise RequestError(
                    f"logit_bias of token {short_repr(token)} must be a number from "
                    f"{-MAX_BIAS:.0e} to {MAX_BIAS:.0e}, "
                    f"or -inf to ban it, not {short_repr(bias)}"
                )
        self._biases = dict(biases)

    def __getitem__(self, token: int) -> float:
        return self._biases[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __hash__(self) -> int:
        return hash(frozenset(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"stop must be non-empty strings, not {short_repr(stop)}")
    return tuple(texts)


def _stop_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list | tuple) or not all(map(_is_token, ids)):
        raise RequestError(
            f"stop_token_ids must be a list of token ids, whole numbers from 0 up, not {short_repr(ids)}"
        )
    return tuple(ids)


def _functions(functions: Any) -> tuple[LogitsProcessor, ...]:
    if not isinstance(functions, list | tuple) or not all(map(callable, functions)):
        raise RequestError(
            f"logits_processors must be a list of functions (token_ids, logits) -> logits, not {short_repr(functions)}"
        )
    return tuple(functions)


def _is_token(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _is_bias(value: Any) -> bool:
    return (is_finite(value) and abs(value) <= MAX_BIAS) or (isinstance(value, float) and value == -math.inf)
