"""The lab's pictures of a checkpoint: figures of matplotlib, which drawing.py writes as PNG or SVG."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.lab.ablation import AblatedNorm, SkippedLayer
from llama_mini.lab.norm_table import NormRow
from llama_mini.lab.recording import MASSIVE, Recording
from llama_mini.lab.reporting.style import (
    BLUE,
    GREEN,
    INK,
    PURPLE,
    VERMILION,
    layer_ticks,
    legend_above,
    log_scale,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BRANCH = {"attention": (BLUE, "o"), "feed_forward": (VERMILION, "s"), "": (GREEN, "D")}
_HEADS = ("q_norm", "k_norm", "v_norm")


class _Place(NamedTuple):
    """Where a norm stands; those of the model have no branch, and stand at layer -1 and behind the last."""

    slot: str
    branch: str
    layer: int


@styled
def residual_rms_picture(recording: Recording) -> "Figure":
    """The RMS of the residual stream by layer, and of what each norm makes of it; q, k and v norms see heads, not it.

    Raises RequestError for a recording that kept no tensors.
    """
    figure, (axes,) = new_figure(1, 4.4)
    resid, depth = recording.resid, len(recording.resid.resid_pre)
    points = [r for pair in zip(resid.resid_pre, resid.resid_mid, strict=True) for r in pair] + [resid.resid_post[-1]]
    x = np.arange(len(points)) / 2
    others = [besides_first(point.rms) for point in points]
    low, middle, high = (np.array([float(rms.quantile(q)) for rms in others]) for q in (0.1, 0.5, 0.9))
    axes.plot(x, middle, color=BLUE, label="before a norm: the stream, median token")
    axes.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0, label="its 10 to 90 % of tokens")
    if points[0].rms.shape[-1] > 1:
        first = [_median(point.rms[:, 0]) for point in points]
        axes.plot(x, first, color=PURPLE, linestyle="--", label="before a norm: the stream, first token")
    places = {path: place for path in recording if (place := _place(path, depth)).slot not in _HEADS}
    for branch, color, marker in (("attention", GREEN, "o"), ("feed_forward", VERMILION, "s"), ("", INK, "D")):
        here = {path: place for path, place in places.items() if place.branch == branch}
        inside = {path: place for path, place in here.items() if place.slot in ("mid_norm", "out_norm")}
        before = [_median(besides_first(recording[path].rms)) for path in inside]
        after = [_median_rms_after(recording, path) for path in here]
        name = f"a norm of {_named(branch)}" if branch else "a norm of the model"
        looks: Any = {"linestyle": "", "color": color, "marker": marker, "markersize": 4}
        if inside:
            at = [_position(place) for place in inside.values()]
            axes.plot(at, before, markerfacecolor="none", label="before it, in the branch", **looks)
        if here:
            axes.plot([_position(place) for place in here.values()], after, label=f"after {name}", **looks)
    log_scale(axes)
    axes.set(xlabel="layer (feed-forward at the half)", ylabel="RMS over the width")
    layer_ticks(axes, depth)
    legend_above(axes, 2)
    return figure


@styled
def norm_cost_picture(costs: Sequence[AblatedNorm]) -> "Figure":
    """What editing each norm costs, in nats per token: a bar a norm, a panel a slot."""
    return _bars_by_slot({row.path: row.dloss for row in costs}, "change of loss\n(nats per token)")


@styled
def gain_picture(rows: Sequence[NormRow]) -> "Figure":
    """The least, mean and largest gain of each norm of a layer that has one: a panel a slot.

    The final norm's are several times as large, so that it would hide the others. Raises RequestError where there is
    nothing to draw.
    """
    gains = {row.path: row for row in rows if row.mean is not None and row.path.startswith("layers.")}
    if not gains:
        raise RequestError("no norm of a layer has a gain, so there is no picture: ask for the table alone")
    depth = _depth(gains)
    panels = _panels(gains, depth)
    figure, all_axes = new_figure(len(panels), 2.6)
    for axes, (slot, places) in zip(all_axes, panels.items(), strict=True):
        for branch, (color, marker) in _BRANCH.items():
            found = {place.layer: gains[path] for path, place in places.items() if place.branch == branch}
            if found:
                low, mean, high = np.array([(row.min, row.mean, row.max) for row in found.values()]).T
                x = np.array(list(found)) + _shift(branch)
                axes.errorbar(
                    x, mean, (mean - low, high - mean), color=color, fmt=marker, markersize=4, label=_named(branch)
                )
        axes.set_xlim(-0.7, depth - 0.3)
        axes.set_ylabel(f"gain of {slot}\n(min, mean, max)")
        layer_ticks(axes, depth)
        legend_above(axes, 3)
    all_axes[-1].set_xlabel("layer")
    return figure


@styled
def massive_picture(recording: Recording) -> "Figure":
    """The largest element of each layer's input and output over the median one."""
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
    """What leaving out each layer costs, and how far the layer turns the stream."""
    figure, (cost, angle) = new_figure(2, 2.3)
    layers = [row.layer for row in rows]
    cost.bar(layers, [row.dloss for row in rows], color=BLUE)
    _signed_scale(cost, [row.dloss for row in rows])
    cost.set_xlim(-0.7, len(layers) - 0.3)
    cost.set_ylabel("change of loss\n(nats per token)")
    angle.plot(layers, [row.angle for row in rows], color=VERMILION, marker="o", markersize=4)
    angle.set(ylabel="input to output\n(angle / π)", xlabel="layer", ylim=(0, None))
    layer_ticks(angle, len(layers) - 1)
    return figure


def _bars_by_slot(values: Mapping[str, float], what: str) -> "Figure":
    depth = _depth(values)
    panels = _panels(values, depth)
    figure, all_axes = new_figure(len(panels), 2.6)
    for axes, (slot, places) in zip(all_axes, panels.items(), strict=True):
        for branch, (color, _) in _BRANCH.items():
            found = {place.layer: values[path] for path, place in places.items() if place.branch == branch}
            if found:
                axes.bar(
                    np.array(list(found)) + _shift(branch),
                    list(found.values()),
                    0.38,
                    color=color,
                    label=_named(branch),
                )
        axes.margins(x=0.015)  # no tick beyond the last layer
        _signed_scale(axes, [values[path] for path in places])
        axes.set_ylabel(f"{slot}: {what}")
        layer_ticks(axes, depth)
        legend_above(axes, 3)
    all_axes[-1].set_xlabel("layer")
    return figure


def _place(path: str, depth: int) -> _Place:
    if path in ("embed_norm", "norm"):
        return _Place(path, "", -1 if path == "embed_norm" else depth)
    _, layer, branch, slot = path.split(".")
    return _Place(slot, branch, int(layer))


def _depth(paths: Iterable[str]) -> int:
    return 1 + max((int(path.split(".")[1]) for path in paths if path.startswith("layers.")), default=-1)


def _panels(paths: Iterable[str], depth: int) -> dict[str, dict[str, _Place]]:
    """The places by slot; those of the model stand in the first panel, left and right of the layers."""
    places = {path: _place(path, depth) for path in paths}
    slots = dict.fromkeys(place.slot for place in places.values() if place.branch) or {"norms": None}
    first = next(iter(slots))
    return {
        slot: {path: place for path, place in places.items() if (place.slot if place.branch else first) == slot}
        for slot in slots
    }


def _position(place: _Place) -> float:
    """Where a norm acts along the stream, in layers: attention fills the first half of one."""
    if not place.branch:
        return max(0, place.layer)
    within = {"pre_norm": 0.0, "mid_norm": 0.25, "out_norm": 0.5, "post_norm": 0.5}[place.slot]
    return place.layer + within + (0.5 if place.branch == "feed_forward" else 0)


def besides_first(rms: Tensor) -> Tensor:
    """The RMS of every token but each row's first, which is often massive; of the first where there are no others."""
    return (rms[:, 1:] if rms.shape[1] > 1 else rms).flatten().double()


def _median(values: Tensor) -> float:
    return float(values.double().quantile(0.5))  # torch's own median is the lower of two


def _median_rms_after(recording: Recording, path: str) -> float:
    y = recording[path].y
    if y is None:
        raise RequestError(f"the recording kept no tensors of {path}: capture with keep='tensors'")
    return _median(besides_first(y.double().pow(2).mean(-1).sqrt()))


def _shift(branch: str) -> float:
    return {"attention": -0.2, "feed_forward": 0.2}.get(branch, 0.0)


def _named(branch: str) -> str:
    return branch.replace("_", "-") or "embedding, final"


def _signed_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Linear where the values are alike, else logarithmic away from zero on both sides."""
    size = np.abs([value for value in values if np.isfinite(value) and value])
    if len(size) and size.max() > 30 * np.median(size):
        axes.set_yscale("symlog", linthresh=10.0 ** np.round(np.log10(np.median(size))))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color=INK, linewidth=0.8)
