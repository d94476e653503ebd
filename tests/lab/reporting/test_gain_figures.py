"""The picture of folded gains shows them, whatever the width."""

import numpy as np
import pytest
import torch

from llama_mini import lab
from llama_mini.lab.reporting.gain_figures import folded_gain_picture
from tests.tiny_models import tiny_model

pytest.importorskip("matplotlib", reason="pictures need the extra lab")


def test_a_map_for_each_slot_a_line_for_each_layer() -> None:
    gains = lab.folded_gains(tiny_model(1, norm_plan="sub"))
    *axes, _ = folded_gain_picture(gains).axes
    assert [one.get_title() for one in axes] == [
        *(f"{branch}.{slot}_norm" for branch in ("attention", "feed_forward") for slot in ("pre", "mid")),
        "final norm",
    ]
    shown = axes[1].get_images()[0].get_array()
    layers = [gains[f"layers.{i}.attention.mid_norm"].numpy() for i in range(3)]
    np.testing.assert_allclose(shown, [layer / np.median(layer) for layer in layers], rtol=1e-6)


def test_where_dimensions_share_a_column_the_farthest_from_the_median_shows() -> None:
    gain = torch.ones(1500)
    gain[[700, 701, 1499]] = torch.tensor([0.01, 50.0, 3.0])
    (shown,) = np.asarray(folded_gain_picture({"norm": gain}).axes[0].get_images()[0].get_array())
    assert len(shown) == 500
    np.testing.assert_allclose(shown[[233, 499]], [0.01, 3.0])
    assert (np.delete(shown, [233, 499]) == 1).all()
