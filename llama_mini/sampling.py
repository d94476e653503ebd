"""Logits to token: pure functions and an explicit generator, in the order and with the meaning of transformers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_mini.checks import is_finite, is_whole, shown
from llama_mini.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample and when to stop. The default is greedy, to the end of the text or of the context.

    Args:
        temperature: divides the logits; 0 is greedy, and the three below then change nothing.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keeps tokens at least this share as likely as the likeliest; 0 keeps all.
        seed: of this request's own generator; None draws one.
        max_tokens: new tokens at most; None goes to the context's end.
        stop: strings that end the text; neither they nor what follows them is returned.
        ignore_eos: goes on past the end-of-text tokens.

    Raises:
        RequestError: names the parameter, what was given and what is possible.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop must be non-empty strings, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        _check_number("temperature", self.temperature, 0, math.inf)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_whole("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, 1)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")

    def generator(self) -> torch.Generator:
        """A new random generator for one request."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token from finite logits (V,)."""
    if params.temperature == 0:
        return int(logits.argmax())
    weights = torch.softmax(filtered(logits.float().cpu(), params), dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits (..., V) scaled by the temperature, with -inf for every token that top-k, top-p or min-p leave out."""
    logits = with_temperature(logits, params.temperature)
    if params.top_k:
        logits = with_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = with_top_p(logits, params.top_p)
    return with_min_p(logits, params.min_p) if params.min_p else logits


def with_temperature(logits: Tensor, temperature: float) -> Tensor:
    # The maximum is taken off first, so that a temperature of 1e-10 leaves 0 and -inf, and never inf - inf.
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)


def with_top_k(logits: Tensor, k: int) -> Tensor:
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def with_top_p(logits: Tensor, p: float) -> Tensor:
    """Drops the tail whose probabilities, summed from the least likely up, stay within 1 - p; keeps at least one."""
    ascending, order = logits.sort(dim=-1, descending=False)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def with_min_p(logits: Tensor, p: float) -> Tensor:
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if not is_finite(value) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise RequestError(f"{name} must be a number {limits}, not {shown(value)}")


def _check_whole(name: str, value: Any, low: int, high: float = math.inf) -> None:
    if not is_whole(value) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise RequestError(f"{name} must be a whole number {limits}, not {shown(value)}")
