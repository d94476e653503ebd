"""What each norm and each layer contributes: the cost of changing one norm, or skipping one layer, at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.errors import NumericalError
from llama_mini.lab.cost import Score, score
from llama_mini.lab.editing import edited_norms, swapped
from llama_mini.lab.paths import select
from llama_mini.lab.recording import watched
from llama_mini.lab.study import progress
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, as_texts
from llama_mini.model.llama import Llama

_COSTS = ("dloss", "se", "kl", "top1")


@dataclass(frozen=True)
class AblatedNorm:
    """The cost of one edited norm. dloss, its standard error se, kl and top1 are those of Score.

    error: where NaN or infinity first appear, if the edit ends in them; the costs are then NaN. Else None.
    """

    path: str
    dloss: float
    se: float
    kl: float
    top1: float
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


def ablate(model: Llama, ids: Ids, pattern: str | Sequence[str] | None = None, **settings: Any) -> Table[AblatedNorm]:
    """The cost in nats of editing norms one by one, in the order of the forward pass.

    pattern: one pattern of norms or several; None: every norm.
    settings: those of `edit`, by default freeze="quadratic". The statistic for `freeze` is measured once, on the same
        ids, in the unchanged model.

    Raises RequestError as `edit` does; NumericalError if the logits of the unchanged model are not finite.
    """
    if settings.keys() <= {"keep"}:
        settings = {"freeze": "quadratic"} | settings
    paths = select(model, pattern, empty="kind" in settings)
    modules = edited_norms(model, dict.fromkeys(paths, settings), ids)
    base = score(model, ids)
    rows = []
    for path, module in progress(modules.items(), "ablate", unit="norm"):
        rows.append(AblatedNorm(path, **_cost(model, ids, {path: module}, base)))
    return Table(rows)


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
