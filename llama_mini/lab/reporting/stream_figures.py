"""The lab's pictures of what flows through a checkpoint: attention and gradients, beside the residual stream."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_mini.lab.attention_heads import AttentionHead
from llama_mini.lab.comparison import Comparison
from llama_mini.lab.gradient_flow import Gradient
from llama_mini.lab.paths import layer_of
from llama_mini.lab.reporting.figures import branch_of, named, signed_scale
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
    from matplotlib.figure import Figure


@styled
def attention_picture(rows: Sequence[AttentionHead]) -> "Figure":
    """Each head's mass on the first token, under the RMS of that token and of the others where the layer reads them."""
    from matplotlib.colors import ListedColormap, to_rgba

    mass = np.zeros((1 + max(row.head for row in rows), 1 + max(row.layer for row in rows)))
    for row in rows:
        mass[row.head, row.layer] = row.first_mass
    figure, panels = new_figure(2, 2.3)
    size, heads = panels
    layers = {row.layer: row for row in rows}
    for name, label, look in (("first_rms", "first token", "--"), ("median_rms", "median of the others", "-")):
        color = PURPLE if look == "--" else BLUE
        size.plot(list(layers), [getattr(row, name) for row in layers.values()], look, color=color, label=label)
    log_scale(size)
    size.set_ylabel("RMS of the stream\nbefore the layer")
    legend_above(size, 2)
    # Clear instead of white fits a dark page, on which a tenth would look like nothing without the root.
    # Few steps, since each is a shape in the file.
    clear_to_blue = ListedColormap([to_rgba(BLUE, (step / 24) ** 0.5) for step in range(25)])
    looks: Any = {"cmap": clear_to_blue, "vmin": 0, "vmax": 1, "aspect": "auto", "origin": "lower"}
    image = heads.imshow(mass, interpolation="none", **looks)  # in an SVG a pixel for each head
    heads.grid(False)
    heads.set(xlabel="layer", ylabel="head")
    heads.yaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # it is a MaxNLocator
    layer_ticks(heads, mass.shape[1] - 1)
    figure.colorbar(image, ax=panels, label="attention to the first token", aspect=40)
    return figure


@styled
def gradient_picture(rows: Sequence[Gradient]) -> "Figure":
    """The gradient along the stream by layer, and how much larger the first token's is at each norm, after and before.

    q, k and v norms are left out.
    """
    by_point = {row.point: row for row in rows}
    depth = sum(point.endswith(".resid_post") for point in by_point)
    figure, (stream, ratio) = new_figure(2, 2.6)
    points = [by_point[f"layers.{i}.{name}"] for i in range(depth) for name in ("resid_pre", "resid_mid")]
    points.append(by_point[f"layers.{depth - 1}.resid_post"])
    x = np.arange(len(points)) / 2
    stream.plot(x, [row.median for row in points], color=BLUE, label="the stream, median token")
    stream.plot(x, [row.first for row in points], color=PURPLE, linestyle="--", label="the stream, first token")
    stream.set_ylabel("gradient (RMS)")
    for branch, color, marker in (("attention", GREEN, "o"), ("feed_forward", VERMILION, "s")):
        for part, fill, place in (("output", color, "after"), ("input", "none", "before")):
            own = [
                (int(point.split(".")[1]) + (0.5 if branch == "feed_forward" else 0), row.first / row.median)
                for point, row in by_point.items()
                if f".{branch}." in point and point.endswith(f"_norm.{part}") and point.split(".")[3][0] not in "qkv"
            ]
            if own:
                label = f"{place} a norm of {branch.replace('_', '-')}"
                ratio.plot(
                    *zip(*own, strict=True), marker, color=color, markerfacecolor=fill, markersize=4, label=label
                )
    ratio.set(xlabel="layer (feed-forward at the half)", ylabel="gradient: first token\nover median token")
    for axes in (stream, ratio):
        log_scale(axes)
        legend_above(axes, 2)
    layer_ticks(ratio, depth)
    return figure


@styled
def comparison_picture(comparison: Comparison) -> "Figure":
    """Two models by layer: the RMS of the stream, how far the second one's is from it, and what their norms cost.

    The costs have bars of two standard errors.
    """
    figure, (stream, change, cost) = new_figure(3, 2.4)
    rows = comparison.stream
    depth, x = len(rows) // 2, np.arange(len(rows)) / 2
    for who, label, color in (("median", "median token", BLUE), ("first", "first token", PURPLE)):
        stream.plot(x, rows.column(f"{who}_a"), color=color, label=f"a: {label}")
        stream.plot(x, rows.column(f"{who}_b"), ":", color=INK, label="" if who == "first" else "b")
        change.plot(x, rows.column(f"{who}_change"), color=color, label=f"from a to b: {label}")
    stream.set_ylabel("RMS of the stream")
    change.set_ylabel("change of the stream\n(share of its length)")
    for branch, color, marker in (("attention", GREEN, "o"), ("feed_forward", VERMILION, "s"), ("", INK, "D")):
        for side, fill, shift in (("a", color, -0.1), ("b", "none", 0.1)):  # side by side, since they may be equal
            own = {row.path: row for row in comparison.norms if branch_of(row.path) == branch}
            own = {path: row for path, row in own.items() if getattr(row, f"dloss_{side}") is not None}
            if not own:
                continue
            at = [max(0, layer_of(path, depth)) + (0.5 if branch == "feed_forward" else 0) + shift for path in own]
            costs = np.array([[getattr(row, f"{name}_{side}") for row in own.values()] for name in ("dloss", "se")])
            looks: Any = {"color": color, "markerfacecolor": fill, "markersize": 4, "label": f"{side}: {named(branch)}"}
            cost.errorbar(at, costs[0], 2 * costs[1], fmt=marker, **looks)
    signed_scale(cost, [v for s in "ab" for v in comparison.norms.column(f"dloss_{s}") if v is not None])
    cost.set(xlabel="layer (feed-forward at the half)", ylabel="cost of a norm\n(nats per token)")
    log_scale(stream)
    if max(rows.column("median_change")) > 0:  # the streams of a model and itself are equal
        log_scale(change)
    for axes in (stream, change, cost):
        legend_above(axes, 3)
    layer_ticks(cost, depth)
    return figure
