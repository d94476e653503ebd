"""What each norm and each layer contributes: the cost of changing norms, alone or together, or of skipping a layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.cost import Score, score
from llama_mini.lab.editing import edited_norms, swapped
from llama_mini.lab.freezing import Frozen
from llama_mini.lab.paths import select, split
from llama_mini.lab.recording import watched
from llama_mini.lab.study import progress
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, as_texts
from llama_mini.model.llama import Llama
from llama_mini.validate import check_choice, check_flag

_COSTS = ("dloss", "se", "kl", "top1")


@dataclass(frozen=True)
class AblatedNorm:
    """The cost of edited norms. dloss, its standard error se, kl and top1 are those of Score.

    path: the norm; of norms edited together, the pattern; if `cumulative`, the norm that is edited with all those of
        the rows before.
    kept: how many tokens a frozen norm keeps apart; of several norms, the largest number.
    error: where NaN or infinity first appear, if the edit ends in them; the costs are then NaN. Else None.
    """

    path: str
    dloss: float
    se: float
    kl: float
    top1: float
    kept: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class SkippedLayer:
    """The cost of skipping one layer, and the angle between its input and output in the full model, in units of π.

    error: as in AblatedNorm.
    """

    layer: int
    dloss: float
    se: float
    kl: float
    top1: float
    angle: float
    error: str | None = None


def ablate(
    model: Llama,
    ids: Ids,
    pattern: str | Sequence[str] | None = None,
    *,
    joint: bool = False,
    cumulative: bool | Literal["given"] = False,
    calibrate: Ids | None = None,
    **settings: Any,
) -> Table[AblatedNorm]:
    """The cost in nats of editing norms one by one, in the order of the forward pass.

    pattern: one pattern of norms or several; None: every norm.
    joint: all of them together, in one row.
    cumulative: one after another, each with all before it. True: next is the norm with which the loss is lowest, which
        takes N(N + 1)/2 passes over the texts for N norms. "given": the patterns in their order, a row for each.
    calibrate: the texts that the constants of `freeze` are measured on, in the unchanged model; None: `ids`.
    settings: those of `edit`, by default freeze="quadratic".

    Raises RequestError as `edit` does; NumericalError if the logits of the unchanged model are not finite.
    """
    check_flag("joint", joint, RequestError)
    if not isinstance(cumulative, bool):
        check_choice("cumulative", cumulative, ("given",), RequestError)
    if joint and cumulative:
        raise RequestError("joint edits all norms together, cumulative one after another: give one of them")
    if settings.keys() <= {"keep"}:
        settings = {"freeze": "quadratic"} | settings
    paths = select(model, pattern, empty="kind" in settings)
    modules = edited_norms(model, dict.fromkeys(paths, settings), ids, calibrate)
    base = score(model, ids)
    groups = {path: [path] for path in paths}
    if joint:
        groups = {"every norm" if pattern is None else ",".join(split(pattern)): paths}
    elif cumulative == "given" and pattern is not None:
        groups = {one: select(model, one, empty="kind" in settings) for one in split(pattern)}
    rows: list[AblatedNorm] = []
    done: list[str] = []
    for _ in progress(range(len(groups)), "ablate", unit="norm"):
        candidates = list(groups) if cumulative is True else list(groups)[:1]
        costs = [_ablated(model, ids, name, {p: modules[p] for p in done + groups[name]}, base) for name in candidates]
        best = min(costs, key=lambda row: (row.error is not None, row.dloss))
        rows.append(best)
        done += groups.pop(best.path) if cumulative else groups.pop(best.path)[:0]
    return Table(rows, _note(settings, calibrate is not None))


def skip_layers(model: Llama, ids: Ids) -> Table[SkippedLayer]:
    """The cost of skipping each layer, one by one, and the angle by which each turns the residual stream."""
    base = score(model, ids)
    angles = _angles(model, ids)
    rows = []
    for i in progress(range(len(model.layers)), "skip layers", unit="layer"):
        rows.append(SkippedLayer(i, angle=angles[i], **_cost(model, ids, {f"layers.{i}": _PassThrough()}, base)))
    return Table(rows)


class _PassThrough(nn.Module):
    """A layer that does nothing. nn.Identity would refuse the other arguments of a layer."""

    def forward(self, x: Tensor, *context: object) -> Tensor:
        return x


def _ablated(model: Llama, ids: Ids, path: str, modules: dict[str, nn.Module], base: Score) -> AblatedNorm:
    kept = max((int(norm.kept.sum()) for norm in modules.values() if isinstance(norm, Frozen)), default=None)
    return AblatedNorm(path, kept=kept, **_cost(model, ids, modules, base))


def _note(settings: Mapping[str, Any], calibrated: bool) -> str:
    """What the costs are those of."""
    words = [f"{name}={value}" for name, value in settings.items()]
    if "freeze" in settings:
        words += [] if "keep" in settings else ["keep=first"]
        words.append(f"constants measured on {'other texts' if calibrated else 'the same texts'}")
    return f"{', '.join(words)}; dloss in nats per token, se its standard error"


def _cost(model: Llama, ids: Ids, modules: dict[str, nn.Module], base: Score) -> dict[str, Any]:
    with swapped(model, modules):
        try:
            changed = score(model, ids, against=base)
        except NumericalError as error:
            return dict.fromkeys(_COSTS, math.nan) | {"error": str(error)}
    return {name: getattr(changed, name) for name in _COSTS}


def _angles(model: Llama, ids: Ids) -> list[float]:
    """By layer, the mean over tokens of the angle between input and output, in units of π."""
    texts = as_texts(model, ids)
    angles: dict[str, float] = {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        u, v = (nn.functional.normalize(z.double(), dim=-1) for z in (x, y))
        half = torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))  # arccos loses small angles
        angles[name] = float(half[texts.real].mean()) * 2 / math.pi

    layers = {str(i): layer for i, layer in enumerate(model.layers)}
    with torch.inference_mode(), watched(layers, record):
        model(texts.tokens)
    return [angles[name] for name in layers]
