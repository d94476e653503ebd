"""From logits to a token: penalties, filters and sampling, in the order and with the meaning of transformers."""

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from llama_mini.engine.sampling_params import LogitsProcessor, SamplingParams
from llama_mini.engine.structured import Constraint
from llama_mini.errors import RequestError


def processed(
    logits: Tensor,
    params: SamplingParams,
    prompt: list[int],
    new: list[int],
    eos_ids: Collection[int],
    constraint: Constraint | None = None,
) -> Tensor:
    """Applies every step before the temperature: finite logits (V,) -> (V,) float32, -inf for banned tokens.

    Returns the same tensor if no step is set, else a new one. Raises RequestError if all tokens are banned.
    """
    if not params.changes_logits:
        return logits
    logits = logits.to(torch.float32, copy=True)
    if params.logit_bias:
        logits = with_bias(logits, params.logit_bias)
    if params.repetition_penalty != 1:
        logits = with_repetition_penalty(logits, [*prompt, *new], params.repetition_penalty)
    if new and (params.presence_penalty or params.frequency_penalty):
        logits = with_count_penalties(logits, new, params.presence_penalty, params.frequency_penalty)
    if len(new) < params.min_tokens:
        logits = without_tokens(logits, {*eos_ids, *params.stop_token_ids})
    banned, which = None, f"all {len(logits)} tokens"
    if constraint is not None:
        banned, which = constraint.banned().to(logits.device), f"all tokens that {constraint.name} allows"
        logits = logits.masked_fill(banned, -math.inf)
    if logits.isneginf().all():
        raise RequestError(f"logit_bias and min_tokens ban {which}: leave at least one to sample")
    for processor in params.logits_processors:
        logits = _checked(processor, processor([*prompt, *new], logits), logits, banned)
    return logits


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Samples one token from logits (V,), each finite or -inf, at least one of them finite."""
    if params.temperature == 0:
        return int(logits.numpy(force=True).argmax())  # 20 times faster than PyTorch's; on a tie, the lowest id
    # Gumbel noise: logit - log(q), with q from Exp(1), is largest for token i with probability softmax(logits)[i]. Each
    # token of the vocabulary has its own random number, so that a rounding or a filter seldom changes the token drawn.
    # u is in float64, where q = -log(u) goes down to 1e-16. The steps of float32, 6e-8, are too coarse for rare tokens.
    noise = torch.rand(len(logits), dtype=torch.float64, device="cpu", generator=generator).numpy()
    ids, logits = candidates(logits.float().cpu(), params)
    if len(ids) < len(noise):
        noise = noise[ids.numpy()]
    np.maximum(noise, 2.0**-54, out=noise)  # u may be 0; in place, since new memory takes longer than a logarithm
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return int(ids[int(np.subtract(logits.numpy(), noise, out=noise).argmax())])


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The token ids (N,) that pass top-k, top-p and min-p, ascending, and their logits (N,) over the temperature."""
    logits = with_temperature(logits, params.temperature)
    # int64 would need new memory pages, which takes longer than all filters.
    ids = torch.arange(len(logits), dtype=torch.int32, device="cpu")
    if params.top_k:
        indices = in_top_k(logits, params.top_k)
        ids, logits = ids[indices], logits[indices]
    if params.top_p < 1:
        indices = in_top_p(logits, params.top_p)
        ids, logits = ids[indices], logits[indices]
    if params.min_p:
        indices = in_min_p(logits, params.min_p)
        ids, logits = ids[indices], logits[indices]
    return ids, logits


def with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits (V,) divided by the temperature, with a maximum of 0."""
    # Subtracting the maximum first avoids inf - inf: a temperature of 1e-10 gives 0 and -inf.
    return (logits - logits.amax()) / _within_float32(temperature)


def in_top_k(logits: Tensor, k: int) -> Tensor:
    """The indices of the k largest logits and of all that equal the k-th, ascending."""
    smallest = logits.topk(min(k, len(logits))).values[-1]
    return (logits >= smallest).nonzero()[:, 0]


def in_top_p(logits: Tensor, p: float) -> Tensor:
    """The indices of the likeliest tokens that together reach p, ascending; at least one.

    As in transformers, tokens are removed from the least likely up while their sum is at most 1 - p.
    """
    probabilities = logits.softmax(-1)
    # Tokens below (1 - p) / 2V cannot together reach 1 - p, so only the others, a few hundred, are sorted.
    likely = (probabilities >= (1 - p) / (2 * len(logits))).nonzero()[:, 0]
    ascending = likely[logits[likely].argsort(stable=True)]
    weights = probabilities[ascending].double()
    unlikely = probabilities.sum(dtype=torch.float64) - weights.sum()
    keep = weights.cumsum(-1) + unlikely > 1 - p
    keep[-1] = True
    return ascending[keep].sort().values


def in_min_p(logits: Tensor, p: float) -> Tensor:
    """The indices of tokens at least p times as likely as the likeliest. The largest logit must be 0."""
    return (logits >= math.log(p)).nonzero()[:, 0]


def with_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    tokens = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(0, tokens, torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device))


def with_repetition_penalty(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Penalises each token of `seen` once, however often it occurs: all its copies write the same value."""
    penalty = _within_float32(penalty)
    tokens = torch.tensor(seen, device=logits.device)
    x = logits[tokens]
    x = torch.where(x < 0, x * penalty, x / penalty).clamp(max=torch.finfo(x.dtype).max)
    return logits.index_copy(0, tokens, x)


def with_count_penalties(logits: Tensor, new: list[int], presence: float, frequency: float) -> Tensor:
    tokens, counts = torch.tensor(new, device=logits.device).unique(return_counts=True)
    return logits.index_add(0, tokens, -(presence + frequency * counts.to(logits.dtype)))


def without_tokens(logits: Tensor, banned: Collection[int]) -> Tensor:
    tokens = torch.tensor([i for i in banned if i < len(logits)], dtype=torch.int64, device=logits.device)
    return logits.index_fill(0, tokens, -math.inf)


def _checked(processor: LogitsProcessor, result: object, before: Tensor, banned: Tensor | None) -> Tensor:
    """The result of a logits processor without the banned tokens, (V,) flags. Raises RequestError if none is left."""
    name = getattr(processor, "__name__", type(processor).__name__)
    expected = f"logits processor {name} must return floating-point logits of shape {tuple(before.shape)}"
    if not isinstance(result, Tensor):
        raise RequestError(f"{expected}, not a {type(result).__name__}")
    if result.shape != before.shape or not result.is_floating_point():
        raise RequestError(f"{expected}, not {result.dtype} of shape {tuple(result.shape)}")
    logits = result.detach().to(before)
    if logits.isnan().any() or logits.isposinf().any():
        value = "NaN" if logits.isnan().any() else "+inf"
        raise RequestError(f"{expected}, finite or -inf, not {value}")
    if banned is not None:
        logits = logits.masked_fill(banned, -math.inf)
    if logits.isneginf().all():
        raise RequestError(f"logits processor {name} bans all {len(logits)} tokens: it must leave at least one")
    return logits


def _within_float32(divisor: float) -> float:
    """The divisor, moved away from 0 and infinity in float32, so that 0 / 0 and inf / inf cannot occur."""
    return float(min(max(divisor, 1e-30), 1e30))  # PyTorch refuses a large int
