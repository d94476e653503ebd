"""Measures on random models the profile that theory.py predicts; and makes the lab's random models."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.lab.recording import watched
from llama_mini.lab.study import MOST_SEEDS, Floats, Plan, as_plan, label, progress
from llama_mini.lab.theory import Profile
from llama_mini.model.config import Activation, LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.validate import check_whole

_TOKENS = 64  # sequences of one token each


@contextmanager
def own_modes() -> Iterator[None]:
    """Gradients, and new tensors in float32 on the CPU, whatever modes of torch the caller has set; they come back."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


@own_modes()
def init(
    plan: Plan, depth: int, dim: int = 256, seeds: int = 3, activation: Activation = "silu", gated: bool = True
) -> Profile:
    """What `plan` does to one token in a random model: mean and standard deviation, the spread, over `seeds` models.

    Each model has width `dim`, a multiple of 8, four heads and hidden_dim 4·dim, and reads 64 sequences of one token.
    activation, gated: of the feed-forward layers, as in `predict`.
    The gradient is that of a random direction at x_L, by autograd in float32. A stream that overflows float32 gives inf
    or NaN; that of `none` overflows within eight layers.

    Raises RequestError or ConfigError.
    """
    norms = as_plan(plan, depth)
    check_whole("seeds", seeds, RequestError, 1, MOST_SEEDS)
    bar = progress(range(seeds), f"init {label(plan):.40}", unit="model")
    with np.errstate(all="ignore"):
        of_ff = {"activation": activation, "gated_mlp": gated}
        runs = [_measure(random_llama(norms, depth, dim, _TOKENS, seed, **of_ff), seed) for seed in bar]
        moment, gradient, angle = (np.array(values) for values in zip(*runs, strict=True))
        of_moment, of_gradient, of_angle = map(spread_over_seeds, (moment, gradient, angle))
        spread = Profile(label(plan), of_moment, of_gradient, of_angle) if seeds > 1 else None
        return Profile(label(plan), moment.mean(axis=0), gradient.mean(axis=0), angle.mean(axis=0), spread)


def spread_over_seeds(values: Floats) -> Floats:
    """Standard deviation over the first axis; NaN for a single seed, which has none."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def spread_of(values: Floats) -> float | None:
    """That of a number for each seed, for a table: None for a single seed."""
    return float(spread_over_seeds(values)) if len(values) > 1 else None


def random_llama(plan: Plan, depth: int, dim: int, vocab_size: int, seed: int, **settings: Any) -> Llama:
    """A random model as theory.py assumes: four heads, hidden_dim 4·dim. The caller's random state does not change."""
    check_whole("dim", dim, RequestError, 8, 16384)
    if dim % 8:
        raise RequestError(f"dim must be a multiple of 8, for four heads of even width, not {dim}")
    sizes: Any = {"dim": dim, "n_layers": depth, "n_heads": 4, "hidden_dim": 4 * dim, "vocab_size": vocab_size}
    config = LlamaConfig(norm_plan=as_plan(plan, depth), **sizes, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Llama(config)


def residual_stream(model: Llama, tokens: Tensor) -> list[Tensor]:
    """x_0 to x_L, each (B, T, C), with their graph: the input of the first layer, then the output of each layer."""
    stream: list[Tensor] = []

    def record(_: str, x: Tensor, y: Tensor) -> None:
        stream.extend((y,) if stream else (x, y))

    with watched({str(i): layer for i, layer in enumerate(model.layers)}, record):
        model.hidden(tokens)
    return stream


def _measure(model: Llama, seed: int) -> tuple[Floats, Floats, Floats]:
    """Second moment, relative gradient and angle of one model, each over all tokens."""
    stream = residual_stream(model, torch.arange(_TOKENS)[:, None])
    generator = torch.Generator().manual_seed(seed + MOST_SEEDS)  # with `seed` it would be the embedding
    direction = torch.randn(stream[-1].shape, generator=generator)
    gradients = torch.autograd.grad(stream[-1], stream, direction)
    wide = [x.detach().double() for x in stream]
    moment = np.array([float(x.square().mean()) for x in wide])
    gradient = np.array([float(g.double().norm()) for g in gradients])
    cosines = (torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1) for x, y in pairwise(wide))
    angle = np.array([float(cosine.acos().mean()) for cosine in cosines]) / np.pi
    return moment, gradient / gradient[-1], angle
