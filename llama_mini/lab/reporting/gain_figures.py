"""The picture of folded gains, by layer and dimension."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_mini.lab.reporting.style import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 600  # about as many as the page has pixels


@styled
def folded_gain_picture(gains: Mapping[str, Tensor]) -> "Figure":
    """A map for each slot: a line for each layer, a column for each dimension; the color is the folded gain over the
    median of its norm, on a logarithmic scale from 1/10 to 10. Where dimensions share a column, it shows the one
    farthest from the median. The final norm, alone in its slot, is a map of one line.
    """
    from matplotlib.colors import LogNorm

    slots: dict[str, dict[int, Tensor]] = {}
    for path, gain in gains.items():
        _, layer, slot = path.split(".", 2) if "." in path else ("", "0", "final norm")
        slots.setdefault(slot, {})[int(layer)] = gain / gain.quantile(0.5)
    figure, panels = new_figure(len(slots), 2.0)
    for axes, (slot, layers) in zip(panels, slots.items(), strict=True):
        lines = torch.stack([_columns(gain) for gain in layers.values()])
        extent = (-0.5, len(next(iter(layers.values()))) - 0.5, len(layers) - 0.5, -0.5)
        image = axes.imshow(
            lines, norm=LogNorm(0.1, 10), cmap="PuOr_r", aspect="auto", interpolation="none", extent=extent
        )
        axes.set(ylabel="layer", title=slot)
        if slot == "final norm":
            axes.set(ylabel="", yticks=[])
        axes.grid(False)
    panels[-1].set_xlabel("dimension")
    bar = figure.colorbar(image, ax=panels, label="folded gain / median of its norm")
    bar.ax.yaxis.set_major_formatter("{x:g}")
    return figure


def _columns(gain: Tensor) -> Tensor:
    """At most so many values: of neighbours, the one whose logarithm is largest in magnitude."""
    width = -(-len(gain) // _COLUMNS)
    groups = torch.nn.functional.pad(gain, (0, -len(gain) % width), value=1.0).unflatten(0, (-1, width))
    return groups.gather(1, groups.log().abs().argmax(1, keepdim=True))[:, 0]
