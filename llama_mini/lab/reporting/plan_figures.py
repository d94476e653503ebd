"""The lab's pictures of plans, which need no checkpoint: theory, random models and short trainings."""

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_mini.lab.reporting.style import BLUE, INK, PALETTE, layer_ticks, legend_above, log_scale, new_figure, styled
from llama_mini.lab.study import label
from llama_mini.lab.sweeps import Sweep
from llama_mini.lab.theory import Profile
from llama_mini.lab.training import Race

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = ("-", "--", "-.", ":")


@styled
def init_picture(predicted: Profile, measured: Profile | None = None) -> "Figure":
    """Second moment, gradient and angle by layer at random init: predicted as lines, measured as marks."""
    figure, panels = new_figure(3, 2.0)
    titles = {
        "second_moment": "second moment\nof the stream",
        "gradient": "gradient norm\n(last layer = 1)",
        "angle": "turn of a layer\n(angle / π)",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        values = getattr(predicted, name)
        axes.plot(values, color=INK, linewidth=1.2, label="predicted")
        if measured is not None:
            marks = getattr(measured, name)
            axes.plot(marks, color=BLUE, linestyle="", marker="o", markersize=4, label="measured")
            values = np.concatenate([values, marks])
        axes.set_ylabel(title)
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > 100 * values.min():
            log_scale(axes)
        else:
            axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("layer")
    layer_ticks(panels[-1], predicted.depth)
    legend_above(panels[0], 2)
    return figure


@styled
def sweep_picture(sweep: Sweep) -> "Figure":
    """Gradients at random init against depth, on log axes: for each plan a line, its slope, and a band of all seeds."""
    figure, panels = new_figure(2, 2.8)
    titles = {"last_down": "last down projection", "first_layer": "first layer"}
    order, slopes = np.argsort(sweep.depths), sweep.slopes()
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for i, (plan, norms) in enumerate(getattr(sweep, name).items()):
            looks, slope = _looks(i), getattr(slopes[plan], name)
            x, y = sweep.depths[order], norms[:, order]
            axes.plot(x, y.mean(0), marker="o", markersize=4, label=f"{label(plan):.30}: {slope:.2f}", **looks)
            axes.fill_between(x, y.min(0), y.max(0), color=looks["color"], alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(sweep.depths, [str(depth) for depth in sweep.depths], minor=False)
        axes.set_xticks([], minor=True)
        log_scale(axes)
        axes.set_ylabel(f"gradient norm of\nthe {title}")
        legend_above(axes, 3)
    panels[-1].set_xlabel("layers (in the legends: slopes)")
    return figure


@styled
def race_picture(race: Race) -> "Figure":
    """Training loss by step: the mean over seeds as a line, their range as a band. It ends where a seed diverges."""
    figure, (axes,) = new_figure(1, 3.6)
    starts = np.concatenate([curves[:, 0] for curves in race.loss.values()])
    starts = starts[np.isfinite(starts)]
    top = 1.3 * float(np.median(starts)) if len(starts) else 2 * race.unigram  # cuts off losses that explode
    for i, (plan, curves) in enumerate(race.loss.items()):
        looks = _looks(i)
        steps = np.arange(1, curves.shape[1] + 1)
        with np.errstate(all="ignore"):
            axes.plot(steps, curves.mean(0), label=f"{label(plan):.30}", **looks)
            axes.fill_between(steps, curves.min(0), curves.max(0), color=looks["color"], alpha=0.2, linewidth=0)
    axes.axhline(race.unigram, color=INK, linewidth=0.8, linestyle=":", label="unigram")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(0, top))
    legend_above(axes, 4)
    return figure


def _looks(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": _LINES[i // len(PALETTE) % len(_LINES)]}
