"""The lab's pictures of plans: they show what theory, random models and short trainings gave."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llama_mini.lab.measurement import init
from llama_mini.lab.reporting import plan_figures
from llama_mini.lab.reporting.style import save, svg
from llama_mini.lab.sweeps import Sweep
from llama_mini.lab.theory import predict
from llama_mini.lab.training import Race

pytest.importorskip("matplotlib", reason="pictures need the extra lab")
PRESETS = ("post", "none", "mix(.34)", "peri+qk:full+embed")
MORE = ("pre", "peri", "out", "deep", "lns", "sub", "normformer")


@pytest.mark.parametrize("plan", [*PRESETS, *(pytest.param(plan, marks=pytest.mark.slow) for plan in MORE)])
def test_a_prediction_is_a_line_and_a_measurement_marks(plan: str, tmp_path: Path) -> None:
    predicted, measured = predict(plan, 3), init(plan, 3, dim=16, seeds=2)
    figure = plan_figures.init_picture(predicted, measured)
    for axes, name in zip(figure.axes, ("second_moment", "gradient", "angle"), strict=True):
        line, marks = axes.get_lines()
        np.testing.assert_array_equal(line.get_ydata(), getattr(predicted, name))
        np.testing.assert_array_equal(marks.get_ydata(), getattr(measured, name))
        bars = np.array([path.vertices[:, 1] for path in axes.collections[0].get_paths()])
        np.testing.assert_allclose(np.diff(bars)[:, 0] / 2, getattr(measured.spread, name), atol=1e-12)
    save(figure, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    alone = plan_figures.init_picture(predicted)
    assert [[line.get_label() for line in axes.get_lines()] for axes in alone.axes] == [["predicted"]] * 3


def test_what_overflows_is_left_out() -> None:
    figure = plan_figures.init_picture(predict("none", 14), init("none", 14, dim=16, seeds=1))
    assert figure.axes[0].get_yscale() == "log"
    svg(figure, "a")


def test_a_race_shows_the_mean_and_the_spread_of_the_seeds() -> None:
    curves = np.array([[4.0, 3.0, 2.0], [5.0, 4.0, np.nan]])
    lost = np.full((1, 3), np.nan)
    race = Race({"none": lost, "pre": curves, "post": curves[:1] + 1}, unigram=3.1, learning_rate=1e-3)
    figure = plan_figures.race_picture(race)
    svg(plan_figures.race_picture(Race({"none": lost}, unigram=3.1, learning_rate=1e-3)), "a")
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    np.testing.assert_array_equal(lines["pre"], [4.5, 3.5, np.nan])
    np.testing.assert_array_equal(lines["post"], [5, 4, 3])
    assert set(lines["unigram"]) == {3.1}
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    ends = band[band[:, 0] == 1, 1]
    assert (ends.min(), ends.max()) == pytest.approx((4, 4.5 + 0.5**0.5))  # no lower than the lower seed
    other = Race({"pre": curves}, unigram=3.1, learning_rate=0.01)
    labels = [line.get_label() for line in plan_figures.race_picture(race, other).axes[0].get_lines()]
    assert labels == ["none, 0.001", "pre, 0.001", "post, 0.001", "pre, 0.01", "unigram"]
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.3 * 5)
    svg(figure, "a")


def test_a_sweep_shows_the_mean_the_spread_and_the_slope() -> None:
    depths, rng = np.array([8, 2, 4]), np.random.default_rng(3)
    spread = rng.uniform(0.5, 2, (4, 1))  # of the seeds
    last_down = {"pre": spread * depths**-0.5, "post": spread * depths**0.0 / 3}
    first_layer = {"pre": spread * depths**0.25, "post": spread * depths**2.0}
    figure = plan_figures.sweep_picture(Sweep(depths, last_down, first_layer))
    order = [1, 2, 0]
    for axes, norms, names in (
        (figure.axes[0], last_down, ["pre: -0.50", "post: 0.00"]),
        (figure.axes[1], first_layer, ["pre: 0.25", "post: 2.00"]),
    ):
        assert [line.get_label() for line in axes.get_lines()] == names
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        for line, band, curves in zip(axes.get_lines(), axes.collections, norms.values(), strict=True):
            assert list(line.get_xdata()) == [2, 4, 8]
            np.testing.assert_allclose(line.get_ydata(), curves.mean(0)[order])
            ends, sd = band.get_paths()[0].vertices[:, 1], curves.std(0, ddof=1)
            low = np.maximum(curves.mean(0) - sd, curves.min(0))
            assert (ends.min(), ends.max()) == pytest.approx((low.min(), (curves.mean(0) + sd).max()))
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["8", "2", "4"]
    svg(figure, "a")


def test_gradients_that_overflow_or_vanish_are_drawn_as_far_as_they_go() -> None:
    norms = {"none": np.array([[1.0, np.inf], [2.0, np.nan]]), "a": np.zeros((2, 2))}
    svg(plan_figures.sweep_picture(Sweep(np.array([2, 4]), norms, norms)), "a")


def test_ticks_below_one_are_written_out() -> None:
    norms = {"pre": np.array([[0.9, 0.35]])}
    figure = plan_figures.sweep_picture(Sweep(np.array([2, 4]), norms, norms))
    drawn = svg(figure, "a")
    assert ">0.6<" in drawn
    assert "e−01" not in drawn
