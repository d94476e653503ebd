"""The picture of a healing shows its curves, and needs nothing but them."""

import math

import pytest

from llama_mini.lab.distillation import Point
from llama_mini.lab.healing import Healed
from llama_mini.lab.reporting.healing_figure import healing_picture
from llama_mini.lab.table import Table
from tests.tiny_models import tiny_model


def run(kls: list[float], control: Healed | None = None) -> Healed:
    points = [Point(512 * i, 0.5 * i, kl, 0.1, kl, 0.5) for i, kl in enumerate(kls)]
    return Healed(Table(points), 9, False, None, tiny_model(1), control)


@pytest.mark.parametrize("kls", [[8.0, 2.0, 0.5], [math.nan, math.nan, 0.5], [0.0, 0.0, 0.0]])
def test_both_curves_are_drawn_against_tokens(kls: list[float]) -> None:
    (axes,) = healing_picture(run(kls, run([8.0, 1.0, 0.1]))).axes
    change, control = axes.get_lines()
    assert change.get_xdata().tolist() == control.get_xdata().tolist() == [0, 512, 1024]
    assert str(change.get_ydata().tolist()) == str(kls)
    assert control.get_ydata().tolist() == [8.0, 1.0, 0.1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"the change: {kls[-1]:.3g}",
        "a random change of equal KL: 0.1",
    ]
    assert axes.get_yscale() == ("linear" if 0.0 in kls else "log")


def test_without_a_control_there_is_one_curve() -> None:
    assert len(healing_picture(run([8.0, 2.0])).axes[0].get_lines()) == 1
