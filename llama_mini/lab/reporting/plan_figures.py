"""The lab's pictures of plans, which need no checkpoint: theory, random models and short trainings."""

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_mini.lab.measurement import spread_over_seeds
from llama_mini.lab.reporting.style import BLUE, INK, PALETTE, layer_ticks, legend_above, log_scale, new_figure, styled
from llama_mini.lab.study import Floats, label
from llama_mini.lab.sweeps import Sweep
from llama_mini.lab.theory import Profile
from llama_mini.lab.training import Race

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = ("-", "--", "-.", ":")


@styled
def init_picture(predicted: Profile, measured: Profile | None = None) -> "Figure":
    """Second moment, gradient and angle by layer at random init: predicted as lines, measured as marks, whose
    bars are the spread, one standard deviation over seeds to either side."""
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
            if measured.spread is not None:
                spread = getattr(measured.spread, name)
                axes.vlines(range(len(marks)), marks - spread, marks + spread, color=BLUE, linewidth=1)
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
    """Gradients at random init against depth, on log axes: for each plan a line, its slope, and a band of one
    standard deviation over seeds, which ends at the least of them."""
    figure, panels = new_figure(2, 2.8)
    titles = {"last_down": "last down projection", "first_layer": "first layer"}
    order, slopes = np.argsort(sweep.depths), sweep.slopes()
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for i, (plan, norms) in enumerate(getattr(sweep, name).items()):
            looks, slope = _looks(i), getattr(slopes[plan], name)
            x, y = sweep.depths[order], norms[:, order]
            axes.plot(x, y.mean(0), marker="o", markersize=4, label=f"{label(plan):.30}: {slope:.2f}", **looks)
            _band(axes, x, y, looks["color"])
        axes.set_xscale("log")
        axes.set_xticks(sweep.depths, [str(depth) for depth in sweep.depths], minor=False)
        axes.set_xticks([], minor=True)
        log_scale(axes)
        axes.set_ylabel(f"gradient norm of\nthe {title}")
        legend_above(axes, 3)
    panels[-1].set_xlabel("layers (in the legends: slopes)")
    return figure


@styled
def race_picture(*races: Race) -> "Figure":
    """Training loss by step: the mean over seeds as a line, and a band of one standard deviation over them. It ends
    where a seed diverges. Several races: of the same text, at other learning rates."""
    figure, (axes,) = new_figure(1, 3.6)
    curves_of = {(plan, race): curves for race in races for plan, curves in race.loss.items()}
    starts = np.concatenate([curves[:, 0] for curves in curves_of.values()])
    starts = starts[np.isfinite(starts)]
    unigram = races[0].unigram
    top = 1.3 * float(np.median(starts)) if len(starts) else 2 * unigram  # cuts off losses that explode
    for i, ((plan, race), curves) in enumerate(curves_of.items()):
        looks, rate = _looks(i), f", {race.learning_rate:g}" if len(races) > 1 else ""
        steps = np.arange(1, curves.shape[1] + 1)
        with np.errstate(all="ignore"):
            axes.plot(steps, curves.mean(0), label=f"{label(plan):.30}{rate}", **looks)
            _band(axes, steps, curves, looks["color"])
    axes.axhline(unigram, color=INK, linewidth=0.8, linestyle=":", label="unigram")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(0, top))
    legend_above(axes, 4)
    return figure


def _band(axes: Any, x: Any, curves: Floats, color: str) -> None:
    """One standard deviation over seeds around the mean. On log axes one that passes zero would vanish."""
    mean, spread = curves.mean(0), spread_over_seeds(curves)
    axes.fill_between(x, np.maximum(mean - spread, curves.min(0)), mean + spread, color=color, alpha=0.2, linewidth=0)


def _looks(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": _LINES[i // len(PALETTE) % len(_LINES)]}
