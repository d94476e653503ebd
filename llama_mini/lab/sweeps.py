"""How the gradient at random init grows or shrinks with depth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llama_mini.engine.logprobs import token_logprobs
from llama_mini.errors import RequestError
from llama_mini.lab.measurement import own_modes, random_llama, spread_of
from llama_mini.lab.study import MOST_SEEDS, Floats, Plan, as_json, as_plans, label, progress
from llama_mini.lab.table import Table
from llama_mini.validate import check_whole, short_repr

_BATCH, _LENGTH, _VOCAB = 4, 16, 256


@dataclass(frozen=True)
class Slopes:
    """How gradient norms of a plan grow with depth: the exponents, and the standard deviations of those of the single
    seeds, None for one seed. NaN if a norm is zero or not finite."""

    plan: str
    last_down: float
    last_down_spread: float | None
    first_layer: float
    first_layer_spread: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """Gradients at random init, at several depths.

    depths: (n,) numbers of layers.
    last_down: per plan, (seeds, n): the norm of the gradient of the last layer's down projection.
    first_layer: per plan, (seeds, n): the norm of the gradient of all parameters of the first layer together.
    """

    depths: NDArray[np.int64]
    last_down: dict[Plan, Floats]
    first_layer: dict[Plan, Floats]

    def slopes(self) -> dict[Plan, Slopes]:
        """Per plan, the least-squares slopes of the mean over seeds against depth, both on log axes."""
        return {
            plan: Slopes(label(plan), *_slopes(self.depths, norms), *_slopes(self.depths, self.first_layer[plan]))
            for plan, norms in self.last_down.items()
        }

    def table(self) -> Table[Slopes]:
        return Table([*self.slopes().values()])

    def to_json(self) -> str:
        return as_json(self)

    def __repr__(self) -> str:
        depths = short_repr(self.depths.tolist())
        return f"Sweep over {depths} layers, slopes of the gradient against depth:\n{self.table()}"


@own_modes()
def sweep(
    plans: Plan | Sequence[Plan], depths: Sequence[int] = (2, 4, 8, 16, 32), dim: int = 64, seeds: int = 3
) -> Sweep:
    """Gradients of plans at random init, at several depths.

    The loss is the cross-entropy of the next token in 4 sequences of 16 random tokens, through the final norm and an
    untied head. Models have a vocabulary of 256, four heads and hidden_dim 4·dim, in float32; a seed draws both model
    and tokens.

    With the defaults the slopes of the last down projection are −0.49 for `pre` and −0.01 for `post` (theory: −1/2 and
    0, Xiong et al. 2020) and −0.24 for `deep` (theory: −1/4); those of the first layer are 2.2 for `out` and 0.24 for
    `out+qk`. The 2.2 is the mean of a heavy-tailed distribution: with other seeds and widths from 64 to 256 it is
    2.15 to 2.35. The others vary by 0.04.

    Raises RequestError or ConfigError.
    """
    depths = list(depths)
    several = as_plans(plans, depths)
    check_whole("seeds", seeds, RequestError, 1, MOST_SEEDS)
    if len(set(depths)) < 2:
        raise RequestError(f"depths must hold at least two different numbers of layers, not {short_repr(depths)}")
    norms, read = np.empty((len(several), seeds, len(depths), 2)), [*several.values()]
    for i, seed, k in progress([*np.ndindex(norms.shape[:3])], "sweep", unit="model"):
        norms[i, seed, k] = _gradients(read[i], depths[k], dim, seed)
    last_down, first_layer = (dict(zip(several, norms[..., part], strict=True)) for part in (0, 1))
    return Sweep(np.array(depths), last_down, first_layer)


def _gradients(plan: Plan, depth: int, dim: int, seed: int) -> tuple[float, float]:
    """Norms of the gradient of the last down projection, and of the first layer."""
    model = random_llama(plan, depth, dim, _VOCAB, seed)
    tokens = torch.randint(0, _VOCAB, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(seed))
    loss = -token_logprobs(model(tokens)[:, :-1], tokens[:, 1:]).mean()
    last = model.get_parameter(f"layers.{depth - 1}.feed_forward.down_proj.weight")
    gradients = torch.autograd.grad(loss, [last, *model.layers[0].parameters()])
    norms = torch.stack([g.double().norm() for g in gradients])
    return float(norms[0]), float(norms[1:].norm())


def _slopes(depths: NDArray[np.int64], norms: Floats) -> tuple[float, float | None]:
    """That of the mean over seeds, and the spread of those of the seeds."""
    with np.errstate(all="ignore"):
        x, y = np.log(depths), np.log([norms.mean(axis=0), *norms])
        x = x - x.mean()
        mean, *of_seeds = (y - y.mean(axis=1, keepdims=True)) @ x / (x @ x)
        return float(mean), spread_of(np.array(of_seeds))
