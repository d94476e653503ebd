"""Two models of one shape side by side: their losses, gains and residual streams, and what their norms cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.lab.ablation import ablate
from llama_mini.lab.cost import Score, score
from llama_mini.lab.freezing import FREEZABLE
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import slots
from llama_mini.lab.recording import capture, first_and_median, watched
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.validate import join_names

_SHAPE = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim")


@dataclass(frozen=True)
class ComparedNorm:
    """One norm in models a and b. A value is None where a model has no such norm, or the norm no gain.

    gain_a, gain_b: the mean of the effective gain. gain_change: ‖b − a‖ / ‖a‖ of the gains as vectors.
    first_a, first_b, median_a, median_b: √(mean x²) of what the norm reads, of the first token and of the others.
    dloss_a, se_a, dloss_b, se_b: the cost of the same edit of the norm in each model, as in `ablate`.
    error: where NaN or infinity first appear, if the edit ends in them.
    """

    path: str
    gain_a: float | None
    gain_b: float | None
    gain_change: float | None
    first_a: float | None
    first_b: float | None
    median_a: float | None
    median_b: float | None
    dloss_a: float | None
    se_a: float | None
    dloss_b: float | None
    se_b: float | None
    error: str | None


@dataclass(frozen=True)
class ComparedPoint:
    """The residual stream at one point: √(mean x²) in both models, of the first token and of the others.

    first_change, median_change: ‖b − a‖ / ‖a‖ of a token's rows, of the first token and of the others.
    """

    point: str
    first_a: float
    first_b: float
    median_a: float
    median_b: float
    first_change: float
    median_change: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """a, b: the scores, b's against a. norms: all that either model has. stream: layer by layer."""

    a: Score
    b: Score
    norms: Table[ComparedNorm]
    stream: Table[ComparedPoint]


def compare(a: Llama, b: Llama, ids: Ids, pattern: str | Sequence[str] | None = None, **settings: Any) -> Comparison:
    """Two models on the same token ids: base and instruct, before and after a change, bfloat16 and int4.

    They may differ in weights, dtype and format, and in where their norms sit. Their shapes must be equal.

    pattern, settings: which norms are edited one by one, and how, as in `ablate`; by default every norm whose statistic
        can be frozen is. Each costs a forward pass of both models.

    Raises RequestError for models of different shapes, and as `ablate` does.
    """
    if unequal := [name for name in _SHAPE if getattr(a.config, name) != getattr(b.config, name)]:
        found = join_names(f"{name} ({getattr(a.config, name)} and {getattr(b.config, name)})" for name in unequal)
        raise RequestError(f"the two models differ in {found}: compare models of one shape and vocabulary")
    if together := [name for name in ("joint", "cumulative") if name in settings]:
        raise RequestError(f"compare edits norms one by one: leave {join_names(together)} out")
    texts = as_texts(a, ids)
    base = score(a, texts)
    scores = base, score(b, texts, against=base)
    sides = [_Side(model, texts, pattern, settings) for model in (a, b)]
    norms = [_norm(path, *sides) for path in slots(a) if any(path in side.read | side.costs for side in sides)]
    return Comparison(*scores, Table(norms), _stream(a, b, texts))


class _Side:
    """What one of the models has and does: the gains of its norms, what they read, and what they cost."""

    def __init__(
        self, model: Llama, texts: Texts, pattern: str | Sequence[str] | None, settings: dict[str, Any]
    ) -> None:
        norms = {path: module for path, module in slots(model).items() if isinstance(module, Norm)}
        self.read = {
            path: first_and_median(record.rms, texts.real)
            for path, record in capture(model, texts, keep="stats").items()
        }
        gains = {path: effective_gain(norm) for path, norm in norms.items()}
        self.gains = {path: gain.double().cpu() for path, gain in gains.items() if gain is not None}
        if pattern is None and ("freeze" in settings or settings.keys() <= {"keep"}):
            pattern = [path for path, norm in norms.items() if norm.kind in FREEZABLE]
        rows = ablate(model, texts, pattern, **settings) if pattern is None or len(pattern) else []
        self.costs = {row.path: row for row in rows}


def _norm(path: str, a: _Side, b: _Side) -> ComparedNorm:
    gains = [side.gains.get(path) for side in (a, b)]
    change = None
    if gains[0] is not None and gains[1] is not None and gains[0].shape == gains[1].shape:
        change = float((gains[1] - gains[0]).norm() / gains[0].norm())
    values: dict[str, float | None] = {}
    errors = []
    for name, side, gain in zip("ab", (a, b), gains, strict=True):
        first, median = side.read.get(path, (None, None))
        cost = side.costs.get(path)
        values |= {f"gain_{name}": None if gain is None else float(gain.mean())}
        values |= {f"first_{name}": first, f"median_{name}": median}
        dloss, se = (cost.dloss, cost.se) if cost else (None, None)
        values |= {f"dloss_{name}": dloss, f"se_{name}": se}
        errors += [f"{name}: {cost.error}"] if cost and cost.error else []
    return ComparedNorm(path=path, gain_change=change, error="; ".join(errors) or None, **values)


def _stream(a: Llama, b: Llama, texts: Texts) -> Table[ComparedPoint]:
    of_a: dict[str, Tensor] = {}
    rows: list[ComparedPoint] = []

    def compare_with_a(point: str, _: Tensor, of_b: Tensor) -> None:
        x, y = (stream.to(a.device, torch.float64) for stream in (of_a.pop(point), of_b))
        (first_a, median_a), (first_b, median_b) = (
            first_and_median(z.pow(2).mean(-1).sqrt(), texts.real) for z in (x, y)
        )
        change = first_and_median((y - x).norm(dim=-1) / x.norm(dim=-1), texts.real)
        rows.append(ComparedPoint(point, first_a, first_b, median_a, median_b, *change))

    with torch.inference_mode():
        with watched(_points(a), lambda point, _, y: of_a.update({point: y})):
            a.hidden(texts.tokens)
        with watched(_points(b), compare_with_a):
            b.hidden(texts.tokens.to(b.device))
    return Table(rows)


def _points(model: Llama) -> dict[str, nn.Module]:
    """The modules whose outputs are the residual stream."""
    points: dict[str, nn.Module] = {"layers.0.resid_pre": model.embed_norm}
    for i in range(len(model.layers)):
        for point, branch in (("resid_mid", "attention"), ("resid_post", "feed_forward")):
            points[f"layers.{i}.{point}"] = model.get_submodule(f"layers.{i}.{branch}")
    return points
