"""The lab's pictures of what flows through a checkpoint: attention and gradients, beside the residual stream."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llama_mini.lab.attention_heads import AttentionHead
from llama_mini.lab.reporting.style import (
    BLUE,
    PURPLE,
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
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

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
    clear_to_blue = LinearSegmentedColormap.from_list("mass", [to_rgba(BLUE, 0), to_rgba(BLUE, 1)])  # fits any page
    at = np.arange(mass.shape[1]), np.arange(mass.shape[0])
    mesh = heads.pcolormesh(*at, mass, cmap=clear_to_blue, vmin=0, vmax=1, shading="nearest")
    heads.grid(False)
    heads.set(xlabel="layer", ylabel="head")
    heads.yaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # it is a MaxNLocator
    layer_ticks(heads, mass.shape[1] - 1)
    figure.colorbar(mesh, ax=panels, label="attention to the first token", aspect=40)
    return figure
