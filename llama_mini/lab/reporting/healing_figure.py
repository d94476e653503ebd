"""The picture of a changed model that is trained back."""

from typing import TYPE_CHECKING

import numpy as np

from llama_mini.lab.healing import Healed
from llama_mini.lab.reporting.style import BLUE, INK, legend_above, log_scale, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def healing_picture(healed: Healed) -> "Figure":
    """Held-out KL against the tokens of training: the change, and the random change of equal KL."""
    figure, (axes,) = new_figure(1, 3.2)
    runs = {"the change": (healed, BLUE, "-")}
    if healed.control is not None:
        runs["a random change of equal KL"] = (healed.control, INK, "--")
    values = np.concatenate([run.curve.column("kl") for run, *_ in runs.values()])
    for name, (run, color, line) in runs.items():
        tokens, kl = run.curve.column("tokens"), run.curve.column("kl")
        axes.plot(tokens, kl, color=color, linestyle=line, marker="o", markersize=4, label=f"{name}: {kl[-1]:.3g}")
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0:
        log_scale(axes)
    axes.set(xlabel="tokens of training", ylabel="KL on held-out texts (nats)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    legend_above(axes, 2)
    return figure
