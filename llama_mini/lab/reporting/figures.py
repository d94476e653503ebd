"""The lab's pictures of a checkpoint, as figures of matplotlib. style.py writes them as PNG or SVG."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llama_mini.errors import RequestError
from llama_mini.lab.ablation import AblatedNorm, SkippedLayer
from llama_mini.lab.massive_activations import MASSIVE
from llama_mini.lab.norm_table import NormRow
from llama_mini.lab.paths import layer_of
from llama_mini.lab.recording import Recording, besides_first, first_and_median
from llama_mini.lab.reporting.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    VERMILION,
    layer_ticks,
    legend_above,
    log_scale,
    new_figure,
    styled,
)
from llama_mini.model.norm_slots import ONLY_IN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BRANCH = {"attention": (BLUE, "o"), "feed_forward": (VERMILION, "s"), "": (GREEN, "D")}
_INSIDE = tuple(f"{slot}_norm" for slot in ONLY_IN)  # off the residual stream
_Branches = dict[str, tuple[list[float], list[str]]]  # by branch, x positions and paths of its norms


class _Address(NamedTuple):
    """The parts of a norm's path. embed_norm and the final norm have no branch; their layers are -1 and the depth."""

    slot: str
    branch: str
    layer: int


@styled
def residual_rms_picture(recording: Recording) -> "Figure":
    """The RMS of the residual stream by layer, and of the output of each norm but those of projections.

    Raises RequestError for a recording that kept no tensors.
    """
    figure, (axes,) = new_figure(1, 4.4)
    resid, depth = recording.resid, len(recording.resid.resid_pre)
    points = [r for pair in zip(resid.resid_pre, resid.resid_mid, strict=True) for r in pair] + [resid.resid_post[-1]]
    x = np.arange(len(points)) / 2
    others = [besides_first(point.rms, recording.texts.real) for point in points]
    low, middle, high = (np.array([float(rms.quantile(q)) for rms in others]) for q in (0.1, 0.5, 0.9))
    axes.plot(x, middle, color=BLUE, label="before a norm: the stream, median token")
    axes.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0, label="its 10 to 90 % of tokens")
    if points[0].rms.shape[-1] > 1:
        axes.plot(
            x,
            [point.first for point in points],
            color=PURPLE,
            linestyle="--",
            label="before a norm: the stream, first token",
        )
    norms = {path: norm for path in recording if (norm := _address(path, depth)).slot not in _INSIDE}
    for branch, color, marker in (("attention", GREEN, "o"), ("feed_forward", VERMILION, "s"), ("", INK, "D")):
        own = {path: norm for path, norm in norms.items() if norm.branch == branch}
        inside = {path: norm for path, norm in own.items() if norm.slot in ("mid_norm", "out_norm")}
        before = [recording[path].median for path in inside]
        after = [_median_rms_after(recording, path) for path in own]
        name = f"a norm of {named(branch)}" if branch else "a norm of the model"
        looks: Any = {"linestyle": "", "color": color, "marker": marker, "markersize": 4}
        if inside:
            at = [_position(norm) for norm in inside.values()]
            axes.plot(at, before, markerfacecolor="none", label="before it, in the branch", **looks)
        if own:
            axes.plot([_position(norm) for norm in own.values()], after, label=f"after {name}", **looks)
    log_scale(axes)
    axes.set(xlabel="layer (feed-forward at the half)", ylabel="RMS over the width")
    layer_ticks(axes, depth)
    legend_above(axes, 2)
    return figure


@styled
def norm_cost_picture(costs: Sequence[AblatedNorm]) -> "Figure":
    """The cost of editing each norm, in nats per token: a bar for each norm, a panel for each slot.

    Lines show two standard errors. A bar that is not longer is grey.
    """
    rows = {row.path: row for row in costs}
    figure, panels = _slot_panels(rows)
    for axes, slot, branches in panels:
        for branch, (x, paths) in branches.items():
            _bars(axes, x, [rows[path] for path in paths], _BRANCH[branch][0], named(branch), width=0.38)
        axes.margins(x=0.015)  # no tick beyond the last layer
        signed_scale(axes, [rows[path].dloss for _, paths in branches.values() for path in paths])
        axes.set_ylabel(f"{slot}: change of loss\n(nats per token)")
        legend_above(axes, 3)
    return figure


@styled
def cumulative_picture(costs: Sequence[AblatedNorm]) -> "Figure":
    """The cost of norms edited one after another, with two standard errors, by their number."""
    figure, (axes,) = new_figure(1, 3.4)
    x, dloss = np.arange(1, len(costs) + 1), np.array([row.dloss for row in costs])
    error = 2 * np.array([row.se for row in costs])
    axes.plot(x, dloss, color=INK, linewidth=0.8)
    axes.fill_between(x, dloss - error, dloss + error, color=GREY, alpha=0.3, linewidth=0, label="± 2 standard errors")
    for branch, (color, marker) in _BRANCH.items():
        own = [i for i, row in enumerate(costs) if branch_of(row.path) == branch]
        if own:
            axes.plot(x[own], dloss[own], linestyle="", color=color, marker=marker, markersize=4, label=named(branch))
    signed_scale(axes, list(dloss))
    axes.set(xlabel="norms edited", ylabel="change of loss\n(nats per token)")
    layer_ticks(axes, len(costs))
    legend_above(axes, 4)
    return figure


@styled
def gain_picture(rows: Sequence[NormRow]) -> "Figure":
    """The smallest, mean and largest gain of each norm of the layers: a panel for each slot.

    The final norm is left out: its gains are several times as large and would hide the others. Raises RequestError if
    no norm of a layer has a gain.
    """
    gains = {row.path: (row.min, row.mean, row.max) for row in rows if row.mean is not None and "." in row.path}
    if not gains:
        raise RequestError("no norm of a layer has a gain, so there is nothing to draw: leave --picture out")
    figure, panels = _slot_panels(gains)
    for axes, slot, branches in panels:
        for branch, (x, paths) in branches.items():
            color, marker = _BRANCH[branch]
            low, mean, high = np.array([gains[path] for path in paths]).T
            error = mean - low, high - mean
            axes.errorbar(x, mean, error, color=color, fmt=marker, markersize=4, label=named(branch))
        axes.set_xlim(-0.7, _depth(gains) - 0.3)
        axes.set_ylabel(f"gain of {slot}\n(min, mean, max)")
        legend_above(axes, 3)
    return figure


@styled
def massive_picture(recording: Recording) -> "Figure":
    """The largest element of the residual stream over the median one, before and after each layer."""
    figure, (axes,) = new_figure(1, 2.8)
    points = [recording.resid.resid_pre[0], *recording.resid.resid_post]
    axes.plot([point.max_over_median for point in points], color=BLUE, marker="o", markersize=4)
    axes.axhline(MASSIVE, color=VERMILION, linestyle="--", label=f"{MASSIVE} times: massive")
    log_scale(axes)
    axes.set(xlabel="layers passed", ylabel="largest / median |x|")
    layer_ticks(axes, len(points) - 1)
    legend_above(axes, 1)
    return figure


@styled
def skip_picture(rows: Sequence[SkippedLayer]) -> "Figure":
    """The cost of skipping layers, branches or runs of them, and the angle by which each turns the stream."""
    figure, (cost, angle) = new_figure(2, 2.3)
    kinds = {
        kind: [row for row in rows if branch_of(f"{row.path}.") == kind] for kind in ("", "attention", "feed_forward")
    }
    kinds = {kind: own for kind, own in kinds.items() if own}
    width, last = 0.8 / len(kinds), 0
    for i, (kind, own) in enumerate(kinds.items()):
        spans = [[int(layer) for layer in row.path.split(".")[1].split("-")] for row in own]
        x, last = [sum(span) / len(span) + (i - (len(kinds) - 1) / 2) * width for span in spans], max(last, *spans[-1])
        color, marker = _BRANCH[kind]
        _bars(cost, x, own, color, f"{named(kind) if kind else 'layers'} skipped", width)
        angle.plot(x, [row.angle for row in own], color=color, marker=marker, markersize=4)
    signed_scale(cost, [row.dloss for row in rows])
    cost.set_xlim(-0.7, last + 0.7)
    cost.set_ylabel("change of loss\n(nats per token)")
    legend_above(cost, 2)
    runs = any("-" in row.path for row in rows)
    angle.set(ylabel="input to output\n(angle / π)", xlabel="middle of the run" if runs else "layer", ylim=(0, None))
    layer_ticks(angle, last)
    return figure


def _bars(
    axes: "Axes", x: Sequence[float], rows: Sequence[AblatedNorm | SkippedLayer], color: str, label: str, width: float
) -> None:
    """Bars of costs with two standard errors; grey where the cost is not larger than these."""
    small = np.array([abs(row.dloss) <= 2 * row.se for row in rows])
    for which, shade, name in ((~small, color, label), (small, GREY, "within two standard errors")):
        if which.any():
            height, error = np.array([(row.dloss, 2 * row.se) for row in rows])[which].T
            name = f"_{name}" if shade == GREY and name in axes.get_legend_handles_labels()[1] else name
            looks: Any = {"elinewidth": 0.8, "ecolor": INK}
            axes.bar(np.array(x)[which], height, width, yerr=error, color=shade, label=name, error_kw=looks)


def branch_of(path: str) -> str:
    return next((name for name in ("attention", "feed_forward") if f".{name}." in path), "")


def _address(path: str, depth: int) -> _Address:
    branch, slot = path.split(".")[2:] if "." in path else ("", path)
    return _Address(slot, branch, layer_of(path, depth))


def _depth(paths: Iterable[str]) -> int:
    return 1 + max((layer_of(path, -1) for path in paths), default=-1)


def _slot_panels(paths: Collection[str]) -> "tuple[Figure, list[tuple[Axes, str, _Branches]]]":
    """A figure with a panel for each slot. Norms outside the layers are in the first panel, left and right of them."""
    depth = _depth(paths)
    norms = {path: _address(path, depth) for path in paths}
    slots = list(dict.fromkeys(norm.slot for norm in norms.values() if norm.branch)) or ["norms"]
    figure, all_axes = new_figure(len(slots), 2.6)
    panels: list[tuple[Axes, str, _Branches]] = []
    for axes, slot in zip(all_axes, slots, strict=True):
        own = {path: norm for path, norm in norms.items() if (norm.slot if norm.branch else slots[0]) == slot}
        branches: _Branches = {}
        for branch, shift in (("attention", -0.2), ("feed_forward", 0.2), ("", 0.0)):
            if layers := {path: norm.layer + shift for path, norm in own.items() if norm.branch == branch}:
                branches[branch] = list(layers.values()), list(layers)
        layer_ticks(axes, depth)
        panels.append((axes, slot, branches))
    all_axes[-1].set_xlabel("layer")
    return figure, panels


def _position(norm: _Address) -> float:
    """Where a norm acts along the stream, in layers. Attention is the first half of a layer."""
    if not norm.branch:
        return max(0, norm.layer)
    within = {"pre_norm": 0.0, "mid_norm": 0.25, "out_norm": 0.5, "post_norm": 0.5}[norm.slot]
    return norm.layer + within + (0.5 if norm.branch == "feed_forward" else 0)


def _median_rms_after(recording: Recording, path: str) -> float:
    y = recording[path].y
    if y is None:
        raise RequestError(f"the recording kept no tensors of {path}: capture with keep='tensors'")
    return first_and_median(y.double().pow(2).mean(-1).sqrt(), recording.texts.real)[1]


def named(branch: str) -> str:
    return branch.replace("_", "-") or "embedding, final"


def signed_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Linear if the values are of similar size, else logarithmic on both sides of zero."""
    size = np.abs([value for value in values if np.isfinite(value) and value])
    if len(size) and size.max() > 30 * np.median(size):
        axes.set_yscale("symlog", linthresh=10.0 ** np.round(np.log10(np.median(size))))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color=INK, linewidth=0.8)
