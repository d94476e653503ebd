"""The pictures of attention, gradients and comparisons show the numbers of the tables."""

from pathlib import Path

import numpy as np
import pytest

from llama_mini import lab
from llama_mini.lab.reporting import stream_figures
from llama_mini.lab.reporting.figures import branch_of, named
from llama_mini.lab.reporting.style import save
from tests.tiny_models import random_tokens, tiny_model

pytest.importorskip("matplotlib", reason="pictures need the extra lab")
IDS = random_tokens(2, 20)


def test_a_pixel_for_each_head_under_the_size_of_the_stream(tmp_path: Path) -> None:
    rows = lab.attention(tiny_model(3), IDS)
    figure = stream_figures.attention_picture(rows)
    size, heads, _ = figure.axes
    (image,) = heads.get_images()
    np.testing.assert_allclose(image.get_array(), np.reshape(rows.column("first_mass"), (3, 6)).T)
    nothing, a_tenth = (image.cmap(image.norm(mass))[3] for mass in (0.0, 0.1))
    assert (nothing, a_tenth > 0.25) == (0, True)  # how opaque they are: a tenth can be seen on any page
    first, median = (line.get_ydata() for line in size.get_lines())
    assert list(first) == rows.column("first_rms")[::6]
    assert list(median) == rows.column("median_rms")[::6]
    save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<image") == 1


def test_the_gradient_of_the_stream_and_on_both_sides_of_the_norms() -> None:
    rows = lab.gradients(tiny_model(3, norm_plan="peri+qk"), IDS)
    found = {row.point: row for row in rows}
    stream, ratio = stream_figures.gradient_picture(rows).axes
    median, first = (line.get_ydata() for line in stream.get_lines())
    points = [f"layers.{i}.{point}" for i in range(3) for point in ("resid_pre", "resid_mid")] + ["layers.2.resid_post"]
    assert list(median) == [found[point].median for point in points]
    assert list(first) == [found[point].first for point in points]
    marks = {line.get_label(): line for line in ratio.get_lines()}
    for label, branch, part in (("after", "attention", "output"), ("before", "feed_forward", "input")):
        mark = marks[f"{label} a norm of {branch.replace('_', '-')}"]
        norms = [found[f"layers.{i}.{branch}.{slot}.{part}"] for i in range(3) for slot in ("pre_norm", "out_norm")]
        assert list(mark.get_ydata()) == [norm.first / norm.median for norm in norms]


def test_two_models_and_the_errors_of_their_costs() -> None:
    compared = lab.compare(tiny_model(3), tiny_model(4), IDS)
    stream, change, cost = stream_figures.comparison_picture(compared).axes
    lines = [list(line.get_ydata()) for line in stream.get_lines()]
    assert lines == [compared.stream.column(name) for name in ("median_a", "median_b", "first_a", "first_b")]
    lines = [list(line.get_ydata()) for line in change.get_lines()]
    assert lines == [compared.stream.column(name) for name in ("median_change", "first_change")]
    places: list[float] = []
    for container in cost.containers:
        side, branch = container.get_label().split(": ")
        own = [row for row in compared.norms if named(branch_of(row.path)) == branch]
        middle, _, (bars,) = container
        places += list(middle.get_xdata())
        assert list(middle.get_ydata()) == [getattr(row, f"dloss_{side}") for row in own]
        spans = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(spans, [4 * getattr(row, f"se_{side}") for row in own])
    assert len(set(places)) == 2 * len(compared.norms)  # no mark hides another


@pytest.mark.parametrize("plan", ["none", "post", "parallel", "out+qk:full"])
def test_every_placement_can_be_drawn(plan: str, tmp_path: Path) -> None:
    model = tiny_model(1, norm_plan=plan)
    save(stream_figures.attention_picture(lab.attention(model, IDS)), tmp_path / "a.svg")
    save(stream_figures.gradient_picture(lab.gradients(model, IDS)), tmp_path / "b.svg")
    save(stream_figures.comparison_picture(lab.compare(model, model, IDS)), tmp_path / "c.svg")
