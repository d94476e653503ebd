"""Short trainings of small models on a few pages of text, to see which plans learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama_mini.engine.logprobs import token_logprobs
from llama_mini.errors import RequestError
from llama_mini.lab.measurement import random_llama, spread_over_seeds
from llama_mini.lab.study import Floats, Plan, as_json, as_plans, check_whole, label
from llama_mini.lab.table import Table
from llama_mini.validate import is_finite, short_repr

_ROWS, _LENGTH, _BYTES = 8, 32, 256
_LAST = 20


@dataclass(frozen=True)
class Final:
    """Loss of the last 20 steps: its mean over steps and seeds, and the standard deviation over seeds."""

    mean: float
    spread: float


@dataclass(frozen=True)
class RaceRow:
    plan: str
    final: float
    spread: float
    diverged: int


@dataclass(frozen=True, eq=False, repr=False)
class Race:
    """
    loss: per plan, (seeds, steps): of each step's batch before its update, in nats per byte. Once it is not finite, a
        training has diverged and ends: the rest is NaN.
    unigram: the entropy of the text's bytes, in nats: the best loss without looking at what came before.
    """

    loss: dict[Plan, Floats]
    unigram: float

    @property
    def final(self) -> dict[Plan, Final]:
        with np.errstate(all="ignore"):
            ends = {plan: loss[:, -_LAST:].mean(axis=1) for plan, loss in self.loss.items()}
            return {plan: Final(float(end.mean()), float(spread_over_seeds(end))) for plan, end in ends.items()}

    def table(self) -> Table[RaceRow]:
        diverged = {plan: int((~np.isfinite(loss[:, -1])).sum()) for plan, loss in self.loss.items()}
        return Table([RaceRow(label(plan), f.mean, f.spread, diverged[plan]) for plan, f in self.final.items()])

    def to_json(self) -> str:
        return as_json(self)

    def __repr__(self) -> str:
        seeds, steps = next(iter(self.loss.values())).shape
        return f"Race of {steps} steps, {seeds} seeds; unigram loss {self.unigram:.4g} nats per byte:\n{self.table()}"


def race(
    plans: Plan | Sequence[Plan],
    steps: int = 150,
    seeds: int = 3,
    depth: int = 12,
    dim: int = 64,
    lr: float = 3e-3,
) -> Race:
    """Trains each plan for a few steps from random init, without warm-up; some six seconds each by default.

    AdamW with a constant rate `lr`, betas 0.9 and 0.95, eps 1e-8, no weight decay, no clipping; batches of 8 rows of 32
    bytes of `sample_text`, the same for every plan of one seed. Models have width `dim`, a multiple of 8, four heads,
    hidden_dim 4·dim and an untied head over 256 bytes, in float32. The same call gives the same numbers on one machine.

    Raises RequestError or ConfigError.
    """
    several = as_plans(plans, [depth])
    check_whole("steps", steps, 1, 1_000_000)
    check_whole("seeds", seeds, 1, 1000)
    if not is_finite(lr) or lr <= 0:
        raise RequestError(f"lr must be a finite number above 0, not {short_repr(lr)}")
    data = torch.tensor(list(sample_text().encode()))
    loss: dict[Plan, Floats] = {plan: np.full((seeds, steps), np.nan) for plan in several}
    with tqdm(total=len(several) * seeds * steps, desc="race", unit="step", disable=None, leave=False) as bar:
        for plan, curves in loss.items():
            for seed, curve in enumerate(curves):
                _train(curve, data, plan, seed, depth, dim, lr, bar)
    return Race(loss, _entropy(data))


def sample_text() -> str:
    """The text that the lab reads where none is given: 20 kB of English, plain ASCII."""
    # Lewis Carroll, Alice's Adventures in Wonderland (1865), chapters I and II without headings, in the public domain;
    # word for word Project Gutenberg's eBook 11.
    return Path(__file__).with_name("text.txt").read_text(encoding="utf-8")


def _train(curve: Floats, data: Tensor, plan: Plan, seed: int, depth: int, dim: int, lr: float, bar: tqdm) -> None:
    """Fills `curve` (steps,) with the loss of each step."""
    model = random_llama(plan, depth, dim, _BYTES, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(_LENGTH + 1)
    for step in range(len(curve)):
        starts = torch.randint(0, len(data) - _LENGTH, (_ROWS, 1), generator=generator)
        rows = data[starts + window]  # (B, T + 1)
        loss = -token_logprobs(model(rows[:, :-1]), rows[:, 1:]).mean()
        curve[step] = loss.item()
        if not np.isfinite(curve[step]):
            bar.update(len(curve) - step)
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()


def _entropy(data: Tensor) -> float:
    counts = np.bincount(data.numpy())
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
