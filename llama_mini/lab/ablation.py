"""What each norm and each layer contributes: the cost of changing norms, alone or together, or of skipping layers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.cost import score
from llama_mini.lab.editing import edited_norms, swapped
from llama_mini.lab.freezing import Frozen
from llama_mini.lab.paths import layer_of, select, select_layers, split
from llama_mini.lab.recording import watched
from llama_mini.lab.study import progress
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import BRANCHES
from llama_mini.validate import check_choice, check_flag, check_whole, short_repr

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
    """The cost of skipping a layer, one of its branches, or a run of either.

    path: what is skipped, such as layers.3, layers.3-5 or layers.3-5.attention.
    angle: in the full model, between the stream before it and the stream after it, in units of π; the mean over tokens.
        Between the branches of a run it includes what the other branches do.
    error: as in AblatedNorm.
    """

    path: str
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
    base = Base(model, ids)
    groups = {path: [path] for path in paths}
    if joint:
        groups = {"every norm" if pattern is None else ",".join(split(pattern)): paths}
    elif cumulative == "given" and pattern is not None:
        groups = {one: select(model, one, empty="kind" in settings) for one in split(pattern)}
    rows: list[AblatedNorm] = []
    done: list[str] = []
    for _ in progress(range(len(groups)), "ablate", unit="norm"):
        candidates = list(groups) if cumulative is True else list(groups)[:1]
        costs = [base.ablated(name, {path: modules[path] for path in done + groups[name]}) for name in candidates]
        best = min(costs, key=lambda row: (row.error is not None, row.dloss))
        rows.append(best)
        edited = groups.pop(best.path)
        if cumulative:
            done += edited
    return Table(rows, _note(settings, calibrate is not None))


def skip_layers(model: Llama, ids: Ids, pattern: str | Sequence[str] = "layers.*", run: int = 1) -> Table[SkippedLayer]:
    """The cost of skipping layers or branches, and the angle by which each turns the residual stream.

    pattern: layers, branches, or both, such as `layers.*`, `layers.20-29.attention` or `layers.*,layers.*.*`.
    run: how many neighbours are skipped together. There is a row for each run of layers, and of branches of one name,
        that the pattern holds whole.

    What is skipped passes its input on, past all of its norms. In a parallel layer the other branch stays as it is.
    Sources: Sun et al. 2025, "The Curse of Depth"; runs and angles: Gromov et al. 2024, "The Unreasonable
    Ineffectiveness of the Deeper Layers".

    Raises RequestError for a pattern that matches nothing or holds no run so long; NumericalError as `ablate` does.
    """
    check_whole("run", run, RequestError, 1)
    runs = _runs(select_layers(model, pattern), len(model.layers), run)
    if not runs:
        raise RequestError(f"no {run} neighbours match {short_repr(pattern)}: give a smaller run, or a wider pattern")
    rows = Base(model, ids).skipped(runs)
    return Table(list(progress(rows, "skip", total=len(runs), unit="run")))


def _runs(paths: list[str], depth: int, length: int) -> dict[str, list[str]]:
    """The runs of `length` neighbours among the paths of layers and branches, by the path of the run."""
    runs = {}
    for first in range(depth):
        for branch in ("", *(f".{name}" for name in BRANCHES)):
            run = [f"layers.{i}{branch}" for i in range(first, first + length)]
            if set(run) <= set(paths):
                runs[f"layers.{first}-{first + length - 1}{branch}" if length > 1 else run[0]] = run
    return runs


class _PassThrough(nn.Module):
    """A layer or branch that does nothing. nn.Identity would refuse the other arguments."""

    def __init__(self, skipped: nn.Module) -> None:
        super().__init__()
        self.pre_norm = getattr(skipped, "pre_norm", None)  # a parallel layer calls it, for both of its branches

    def forward(self, x: Tensor, *context: object, **more: object) -> Tensor:
        return x


class Base:
    """The unchanged model on texts: its score, and its residual stream, from which changed models go on.

    A change does not reach the layers below it. So these are not computed again, and a cost has the bits of a whole
    pass. The stream takes the memory of (B, T, C) for each layer.

    Raises RequestError as `score` does; NumericalError if the logits are not finite.
    """

    def __init__(self, model: Llama, ids: Ids) -> None:
        self.model, self.texts = model, as_texts(model, ids)
        self._outputs: list[Tensor] = []  # of the layers
        layers = {str(i): layer for i, layer in enumerate(model.layers)}
        with watched(layers, lambda _, __, y: self._outputs.append(y)):
            self.score = score(model, self.texts)

    def ablated(self, path: str, modules: Mapping[str, nn.Module]) -> AblatedNorm:
        """The cost of edited norms, those of `edited_norms`, in a row of this path."""
        kept = max((int(norm.kept.sum()) for norm in modules.values() if isinstance(norm, Frozen)), default=None)
        return AblatedNorm(path, kept=kept, **self._cost(modules))

    def frozen(self, paths: Sequence[str], keeps: Sequence[Any]) -> Iterator[list[AblatedNorm]]:
        """For each norm what `ablate` says of it with each `keep`. Two that keep the same tokens are measured once."""
        settings = [{"freeze": "quadratic", "keep": keep} for keep in keeps]
        modules = [edited_norms(self.model, dict.fromkeys(paths, each), self.texts) for each in settings]
        for path in paths:
            rows: dict[tuple[Any, ...], AblatedNorm] = {}
            kept = [tuple(norms[path].get_buffer("kept").flatten().tolist()) for norms in modules]
            for tokens, norms in zip(kept, modules, strict=True):
                rows[tokens] = rows.get(tokens) or self.ablated(path, {path: norms[path]})
            yield [rows[tokens] for tokens in kept]

    def skipped(self, runs: Mapping[str, Sequence[str]]) -> Iterator[SkippedLayer]:
        """What `skip_layers` says of each run of layers or branches."""
        angles = _angles(self.model, self.texts, runs)
        for path, run in runs.items():
            modules = {one: _PassThrough(self.model.get_submodule(one)) for one in run}
            yield SkippedLayer(path, angle=angles[path], **self._cost(modules))

    def _cost(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The costs of the model with these modules in place of its own; the layers below them return what they did."""
        first = min(layer_of(path, len(self._outputs)) for path in modules)
        below = {f"layers.{i}": _Returns(self._outputs[i]) for i in range(first)}
        with swapped(self.model, below | dict(modules)):
            try:
                changed = score(self.model, self.texts, against=self.score)
            except NumericalError as error:
                return dict.fromkeys(_COSTS, math.nan) | {"error": str(error)}
        return {name: getattr(changed, name) for name in _COSTS}


class _Returns(nn.Module):
    """In the place of a layer: returns a known output."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, *_: object) -> Tensor:
        return self.y


def _note(settings: Mapping[str, Any], calibrated: bool) -> str:
    """What the costs are those of."""
    words = [f"{name}={value}" for name, value in settings.items()]
    if "freeze" in settings:
        words += [] if "keep" in settings else ["keep=first"]
        words.append(f"constants measured on {'other texts' if calibrated else 'the same texts'}")
    return f"{', '.join(words)}; dloss in nats per token, se its standard error"


def _angles(model: Llama, texts: Texts, runs: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """By run, the mean over tokens of the angle between the input of its first and the output of its last, over π."""
    before: dict[str, Tensor] = {}  # of the runs that have begun
    angles: dict[str, float] = {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        for path, run in runs.items():
            if run[0] == name:
                before[path] = x
            if run[-1] == name:
                u, v = (nn.functional.normalize(z.double(), dim=-1) for z in (before.pop(path), y))
                half = torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))  # arccos loses small angles
                angles[path] = float(half[texts.real].mean()) * 2 / math.pi

    ends = {end for run in runs.values() for end in (run[0], run[-1])}
    with torch.inference_mode(), watched({path: model.get_submodule(path) for path in ends}, record):
        model(texts.tokens)
    return angles
