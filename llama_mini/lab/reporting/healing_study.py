"""The picture of the study's second half, from healing_study.json: the curves that `heal` gave, and which runs."""

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_mini.lab.reporting.style import BLUE, GREY, INK, VERMILION, legend_above, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Which curve and which of its points, where beside the tick of the change, and how.
_MARKS: tuple[tuple[str, int, float, dict[str, Any]], ...] = (
    ("curve", 0, -0.22, {"color": VERMILION, "fmt": "o", "label": "at once"}),
    ("curve", -1, 0.0, {"color": BLUE, "fmt": "s", "label": "after training"}),
    ("control", -1, 0.22, {"color": GREY, "fmt": "D", "label": "a random change of equal KL, after training"}),
)


@styled
def healing_study_picture(study: dict[str, Any]) -> "Figure":
    """The cost of each change at once and after training, and of a random change of equal KL after the same training.

    study: healing_study.json. A panel for each range of layers, a mark for each seed; lines are two standard errors. A
    cost that is NaN has no mark; a change that cannot be trained is said to diverge.
    """
    columns, runs = study["columns"], study["runs"]
    changes, ranges = (list(dict.fromkeys(run[key] for run in runs)) for key in ("change", "layers"))
    figure, panels = new_figure(len(ranges), 2.1)
    for axes, layers in zip(panels, ranges, strict=True):
        axes.set_yscale("symlog", linthresh=0.1)  # first: the margins are those of the scale
        own = [run for run in runs if run["layers"] == layers]
        for name, at, shift, looks in _MARKS:
            marks = [(run, dict(zip(columns, run[name][at], strict=True))) for run in own if run.get(name)]
            x = [changes.index(run["change"]) + shift + 0.06 * run["seed"] for run, _ in marks]
            y, se = np.array([(end["dloss"], end["se"]) for _, end in marks], float).reshape(-1, 2).T
            axes.errorbar(x, y, 2 * se, markersize=4, elinewidth=0.8, linestyle="", **looks)
        for change in sorted({run["change"] for run in own if "error" in run}):
            axes.annotate(
                "diverges", (changes.index(change), 0), (0, 4), textcoords="offset points", ha="center", fontsize=8
            )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(f"layers {layers}:\nchange of loss (nats)")
        axes.set_xticks(range(len(changes)), [change.replace(" ", "\n") for change in changes], fontsize=8)
    legend_above(panels[0], 3)
    return figure
