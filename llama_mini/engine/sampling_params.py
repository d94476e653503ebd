"""SamplingParams: how one request samples and when it stops. The constructor checks every value."""

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

MAX_BIAS = 1e30  # larger than any logit, and the sum of both is finite in float32
MAX_SEQUENCES = 16384
MAX_LOGPROBS = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample and when to stop. The default is greedy, to the end of the text or of the context.

    Everything is applied in the order of transformers: logit_bias, repetition_penalty, presence_penalty and
    frequency_penalty, min_tokens, logits_processors, then temperature, top_k, top_p, min_p. Greedy sampling takes the
    likeliest token after the processors.

    Args:
        temperature: divides the logits; 0 is greedy sampling, where top_k, top_p and min_p have no effect.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keeps tokens at least min_p times as likely as the likeliest; 0 keeps all.
        repetition_penalty: for tokens of prompt and answer, divides positive logits and multiplies negative ones.
        presence_penalty: subtracted from the logit of each token that the answer contains; -2 to 2.
        frequency_penalty: subtracted once for each time that the token occurs in the answer; -2 to 2.
        logit_bias: token id -> number to add to its logit; -inf bans the token.
        logits_processors: functions (token_ids, logits) -> logits. The ids include the prompt; the logits are (V,)
            float32, -inf for a banned token.
        n: number of answers to each prompt.
        seed: seeds the random generator of this request; None chooses a seed at random.
        min_tokens: number of new tokens before which end-of-text tokens and stop_token_ids are banned.
        max_tokens: maximum number of new tokens; None: as many as fit in the context.
        max_time: seconds after which the answer is cut off; None means no limit.
        stop: strings that end the answer. They are not part of it.
        stop_token_ids: tokens that end the answer like an end-of-text token.
        ignore_eos: do not stop at end-of-text tokens.
        top_logprobs: number of likeliest tokens to return for each token, with their log-probabilities.
        prompt_logprobs: return the log-probabilities of the prompt's tokens too.

    Raises:
        RequestError: names the parameter, its value and the allowed values.
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
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._to_tuple("stop", lambda text: isinstance(text, str) and text != "", "non-empty strings")
        self._to_tuple("stop_token_ids", _is_token, "a list of token ids, whole numbers from 0 up")
        self._to_tuple("logits_processors", callable, "a list of functions (token_ids, logits) -> logits")
        object.__setattr__(self, "logit_bias", None if self.logit_bias is None else _Biases(self.logit_bias))

    def _to_tuple(self, name: str, accept: Callable[[Any], bool], expected: str) -> None:
        values = getattr(self, name)
        if not isinstance(values, list | tuple) or not all(map(accept, values)):
            raise RequestError(f"{name} must be {expected}, not {short_repr(values)}")
        object.__setattr__(self, name, tuple(values))

    def generator(self) -> torch.Generator:
        """A new random generator, seeded with `seed` or at random."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    @cached_property
    def changes_logits(self) -> bool:
        """Whether anything before the temperature changes the logits."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.logits_processors
        )


def check_vocab(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError for a token id outside of the model's vocabulary."""
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        try:
            check_token_ids(ids, vocab_size, RequestError)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None


class _Biases(Mapping[int, float]):
    """A checked, immutable copy of `logit_bias`; unlike MappingProxyType it can be hashed, copied and pickled."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        if not isinstance(biases, Mapping):
            raise RequestError(f"logit_bias must be a dict of token id to number, not {short_repr(biases)}")
        for token, bias in biases.items():
            if not _is_token(token):
                raise RequestError(f"logit_bias must have token ids, whole numbers from 0 up, not {short_repr(token)}")
            if not _is_bias(bias):
                raise RequestError(
                    f"logit_bias of token {short_repr(token)} must be a number from {-MAX_BIAS:.0e} to "
                    f"{MAX_BIAS:.0e}, or -inf to ban it, not {short_repr(bias)}"
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


def _is_token(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _is_bias(value: Any) -> bool:
    return (is_finite(value) and abs(value) <= MAX_BIAS) or (isinstance(value, float) and value == -math.inf)
