"""Short trainings of small models on a few pages of text, to see which plans learn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_mini.engine.logprobs import token_logprobs
from llama_mini.errors import RequestError
from llama_mini.lab.measurement import own_modes, random_llama, spread_of
from llama_mini.lab.study import MOST_SEEDS, Floats, Plan, as_json, as_plans, label, progress
from llama_mini.lab.table import Table
from llama_mini.model.llama import Llama
from llama_mini.validate import check_number, check_whole

_BATCH, _LENGTH, _BYTES = 8, 32, 256
_LAST = 20


@dataclass(frozen=True)
class RaceRow:
    """final: mean loss over the last 20 steps and all seeds; spread: its standard deviation over seeds, None for one.
    diverged: the number of seeds that diverged."""

    plan: str
    learning_rate: float
    final: float
    spread: float | None
    diverged: int


@dataclass(frozen=True, eq=False, repr=False)
class Race:
    """The losses of short trainings.

    loss: per plan, (seeds, steps): the loss of each step's batch before its update, in nats per byte. A training whose
        loss is not finite has diverged and stops: its later losses are NaN.
    unigram: the entropy of the text's bytes, in nats: the best loss of a model that looks at no earlier byte.
    learning_rate: that after the warm-up.
    """

    loss: dict[Plan, Floats]
    unigram: float
    learning_rate: float

    @property
    def final(self) -> dict[Plan, RaceRow]:
        rows: dict[Plan, RaceRow] = {}
        with np.errstate(all="ignore"):
            for plan, loss in self.loss.items():
                end, diverged = loss[:, -_LAST:].mean(axis=1), int((~np.isfinite(loss[:, -1])).sum())
                rows[plan] = RaceRow(label(plan), self.learning_rate, float(end.mean()), spread_of(end), diverged)
        return rows

    def table(self) -> Table[RaceRow]:
        return Table([*self.final.values()])

    def to_json(self) -> str:
        return as_json(self)

    def __repr__(self) -> str:
        seeds, steps = next(iter(self.loss.values())).shape
        return f"Race of {steps} steps, {seeds} seeds; unigram loss {self.unigram:.4g} nats per byte:\n{self.table()}"


@own_modes()
def race(
    plans: Plan | Sequence[Plan],
    steps: int = 150,
    seeds: int = 3,
    depth: int = 12,
    dim: int = 64,
    learning_rate: float = 3e-3,
    warmup_steps: int = 0,
) -> Race:
    """Trains each plan for a few steps from random init: by default about six seconds a plan.

    AdamW, betas 0.9 and 0.95, eps 1e-8, no weight decay and no clipping. The learning rate grows linearly over the
    first `warmup_steps`, the last of which has `learning_rate`, and is constant from there. A batch is 8
    sequences of 32 bytes of `sample_text`, the same for every plan of one seed. Models have width `dim`, a multiple of
    8, four heads, hidden_dim 4·dim and an untied head over 256 bytes, in float32. On one machine the same call gives
    the same numbers.

    Raises RequestError or ConfigError.
    """
    several = as_plans(plans, [depth])
    check_whole("steps", steps, RequestError, 1, 1_000_000)
    check_whole("seeds", seeds, RequestError, 1, MOST_SEEDS)
    check_number("learning_rate", learning_rate, RequestError, above=0)
    check_whole("warmup_steps", warmup_steps, RequestError, 0, steps)
    data = torch.tensor(list(sample_text().encode()))
    loss: dict[Plan, Floats] = {plan: np.full((seeds, steps), np.nan) for plan in several}
    with progress(total=len(several) * seeds * steps, desc="race", unit="step") as bar:
        for plan, curves in loss.items():
            for seed, curve in enumerate(curves):
                model = random_llama(several[plan], depth, dim, _BYTES, seed)
                _train(curve, data, model, seed, learning_rate, warmup_steps, bar.update)
    return Race(loss, _entropy(data), learning_rate)


def sample_text() -> str:
    """The lab's default text: 20 kB of English in plain ASCII."""
    # Lewis Carroll, Alice's Adventures in Wonderland (1865), chapters I and II without headings, in the public domain;
    # word for word Project Gutenberg's eBook 11.
    return Path(__file__).with_name("text.txt").read_text(encoding="utf-8")


def _train(
    curve: Floats, data: Tensor, model: Llama, seed: int, lr: float, warmup: int, done: Callable[[int], object]
) -> None:
    """Fills `curve` (steps,) with the loss of each step, and reports how many steps are done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(_LENGTH + 1)
    for step in range(len(curve)):
        starts = torch.randint(0, len(data) - _LENGTH, (_BATCH, 1), generator=generator)
        tokens = data[starts + window]  # (B, T + 1)
        loss = -token_logprobs(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        curve[step] = loss.item()
        if not np.isfinite(curve[step]):
            done(len(curve) - step)
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done(1)


def _entropy(data: Tensor) -> float:
    counts = np.bincount(data.numpy())
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
