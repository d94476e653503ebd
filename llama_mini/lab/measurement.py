"""The same profile as theory.py's, measured on random models; and the random models that the lab studies."""

from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama_mini.errors import RequestError
from llama_mini.lab.study import Floats, Plan, as_plan, check_whole, label
from llama_mini.lab.theory import Profile
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama

_TOKENS = 64  # sequences of one token each


def init(plan: Plan, depth: int, dim: int = 256, seeds: int = 3) -> Profile:
    """What `plan` does to one token in `Llama(config)` at random init: means over `seeds` models, and their spread.

    Each model has width `dim`, a multiple of 8, four heads and hidden_dim 4·dim, and sees 64 sequences of one token.
    The gradient is autograd's, in float32, from a random direction at x_L. A stream that overflows float32 gives inf
    or NaN, as `none` does within eight layers.

    Raises RequestError or ConfigError.
    """
    as_plan(plan, depth)
    check_whole("seeds", seeds, 1, 1000)
    bar = tqdm(range(seeds), desc=f"init {label(plan):.40}", disable=None, leave=False)
    with np.errstate(all="ignore"):
        runs = [_measure(random_llama(plan, depth, dim, _TOKENS, seed), seed) for seed in bar]
        moment, gradient, angle = (np.array(values) for values in zip(*runs, strict=True))
        moment_spread, gradient_spread, angle_spread = map(spread_over_seeds, (moment, gradient, angle))
        spread = Profile(label(plan), moment_spread, gradient_spread, angle_spread)
        return Profile(label(plan), moment.mean(axis=0), gradient.mean(axis=0), angle.mean(axis=0), spread)


def spread_over_seeds(values: Floats) -> Floats:
    """Standard deviation over the first axis; NaN for a single seed, which has none."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def random_llama(plan: Plan, depth: int, dim: int, vocab_size: int, seed: int) -> Llama:
    """A model as theory.py assumes it: four heads, hidden_dim 4·dim. The caller's random state stays as it is."""
    check_whole("dim", dim, 8, 16384)
    if dim % 8:
        raise RequestError(f"dim must be a multiple of 8, for four heads of even width, not {dim}")
    config = LlamaConfig(
        dim=dim,
        n_layers=depth,
        n_heads=4,
        hidden_dim=4 * dim,
        vocab_size=vocab_size,
        norm_plan=as_plan(plan, depth),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Llama(config)


def residual_stream(model: Llama, tokens: Tensor) -> list[Tensor]:
    """x_0 to x_L, each (B, T, C), with their graph: what enters the first layer and what leaves every layer."""
    stream: list[Tensor] = []
    with ExitStack() as hooks:
        first = model.layers[0].register_forward_pre_hook(lambda _, args: stream.append(args[0]))
        rest = [layer.register_forward_hook(lambda _, args, x: stream.append(x)) for layer in model.layers]
        for hook in (first, *rest):
            hooks.enter_context(hook)
        model.hidden(tokens)
    return stream


def _measure(model: Llama, seed: int) -> tuple[Floats, Floats, Floats]:
    """Second moment, relative gradient and angle of one model, each over all tokens."""
    stream = residual_stream(model, torch.arange(_TOKENS)[:, None])
    direction = torch.randn(stream[-1].shape, generator=torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(stream[-1], stream, direction)
    wide = [x.detach().double() for x in stream]
    moment = np.array([float(x.square().mean()) for x in wide])
    gradient = np.array([float(g.double().norm()) for g in gradients])
    cosines = (torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1) for x, y in pairwise(wide))
    angle = np.array([float(cosine.acos().mean()) for cosine in cosines]) / np.pi
    return moment, gradient / gradient[-1], angle
