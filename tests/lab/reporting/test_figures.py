"""The lab's pictures: they show the numbers, in colours that can be told from the page, as the same bytes each time."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from llama_mini import lab
from llama_mini.errors import RequestError
from llama_mini.lab.ablation import AblatedNorm, SkippedLayer
from llama_mini.lab.reporting import figures
from llama_mini.lab.reporting.style import DARK, GREY, INK, LIGHT, PALETTE, SVG, log_scale, new_figure, save, svg
from tests.tiny_models import random_tokens, tiny_model

BarContainer = pytest.importorskip("matplotlib.container", reason="pictures need the extra lab").BarContainer
to_hex = pytest.importorskip("matplotlib.colors", reason="pictures need the extra lab").to_hex
PRESETS = ("post", "none", "mix(.34)", "peri+qk:full+embed")
MORE = ("pre", "peri", "out", "deep", "lns", "sub", "normformer")
IDS = random_tokens(2, 20)


def test_the_stream_and_the_norms_of_a_model_are_drawn_as_numpy_computes_them() -> None:
    model = tiny_model(3)
    seen: list[np.ndarray] = []
    hooks = [
        branch.register_forward_hook(lambda _, args, y: seen.extend([args[0].double().numpy(), y.double().numpy()]))
        for layer in model.layers
        for branch in (layer.attention, layer.feed_forward)
    ]
    outputs: list[np.ndarray] = []
    hooks.append(model.layers[1].attention.pre_norm.register_forward_hook(lambda *a: outputs.append(a[2].numpy())))
    model(IDS)
    for hook in hooks:
        hook.remove()
    stream = [seen[0], *seen[1::2]]
    (axes,) = figures.residual_rms_picture(lab.capture(model, IDS)).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    expected = [np.median(rms(x)[:, 1:]) for x in stream]
    np.testing.assert_allclose(lines["before a norm: the stream, median token"].get_ydata(), expected, rtol=1e-5)
    first = [np.median(rms(x)[:, 0]) for x in stream]
    np.testing.assert_allclose(lines["before a norm: the stream, first token"].get_ydata(), first, rtol=1e-5)
    after = lines["after a norm of attention"]
    assert list(after.get_xdata()) == [0, 1, 2]
    assert after.get_ydata()[1] == pytest.approx(np.median(rms(outputs[0])[:, 1:]), rel=1e-5)
    assert list(lines["after a norm of feed-forward"].get_xdata()) == [0.5, 1.5, 2.5]


def rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.asarray(x, np.float64) ** 2, -1))


def test_a_norm_inside_a_branch_is_drawn_before_and_after() -> None:
    recording = lab.capture(tiny_model(3, norm_plan="out"), IDS)
    (axes,) = figures.residual_rms_picture(recording).axes
    hollow = [line for line in axes.get_lines() if line.get_label() == "before it, in the branch"]
    assert [list(line.get_xdata()) for line in hollow] == [[0.5, 1.5, 2.5], [1, 2, 3]]
    x = recording["layers.2.feed_forward.out_norm"].x
    assert x is not None
    assert hollow[1].get_ydata()[2] == pytest.approx(np.median(rms(x.numpy())[:, 1:]), rel=1e-5)


def test_a_recording_without_tensors_is_refused() -> None:
    recording = lab.capture(tiny_model(), IDS, keep="stats")
    with pytest.raises(RequestError, match=r"kept no tensors of layers\.0\.attention\.pre_norm: capture with keep"):
        figures.residual_rms_picture(recording)


def test_a_bar_is_as_high_as_the_cost_and_stands_at_its_layer() -> None:
    costs = {"embed_norm": 0.4, "layers.0.attention.pre_norm": -0.1, "layers.1.feed_forward.pre_norm": 0.2}
    costs |= {"layers.1.attention.out_norm": 0.3, "norm": 0.5}
    figure = figures.norm_cost_picture([AblatedNorm(path, cost, 0.01, 0.0, 1.0) for path, cost in costs.items()])
    bars = {
        axes.get_ylabel().partition(":")[0]: {
            (container.get_label(), round(bar.get_x() + bar.get_width() / 2, 6)): bar.get_height()
            for container in axes.containers
            if isinstance(container, BarContainer)
            for bar in container
        }
        for axes in figure.axes
    }
    assert bars == {
        "pre_norm": {
            ("attention", -0.2): -0.1,
            ("feed-forward", 1.2): 0.2,
            ("embedding, final", -1): 0.4,
            ("embedding, final", 2): 0.5,
        },
        "out_norm": {("attention", 0.8): 0.3},
    }


def test_a_cost_within_two_standard_errors_is_grey() -> None:
    costs = [("layers.0.attention.pre_norm", 0.3, 0.1), ("layers.1.attention.pre_norm", -0.1, 0.06)]
    costs += [("layers.0.feed_forward.pre_norm", -0.3, 0.2)]
    rows = [AblatedNorm(path, cost, se, 0.0, 1.0) for path, cost, se in costs]
    skipped = [SkippedLayer(f"layers.{i}", cost, se, 0.0, 1.0, 0.1) for i, (_, cost, se) in enumerate(costs)]
    for figure in (figures.norm_cost_picture(rows), figures.skip_picture(skipped)):
        bars = [bar for bar in figure.axes[0].patches if bar.get_height()]
        assert sorted(b.get_height() for b in bars if to_hex(b.get_facecolor()) == GREY) == [-0.3, -0.1]
        assert [b.get_height() for b in bars if to_hex(b.get_facecolor()) != GREY] == [0.3]
        ends = [tuple(segment[:, 1]) for line in figure.axes[0].collections for segment in line.get_segments()]
        expected = [(cost - 2 * se, cost + 2 * se) for _, cost, se in costs]
        np.testing.assert_allclose(sorted(ends), sorted(expected))
        names = figure.axes[0].get_legend_handles_labels()[1]
        assert names.count("within two standard errors") == 1


def test_costs_one_after_another_are_a_line() -> None:
    paths = ["norm", "layers.0.attention.pre_norm", "layers.*.feed_forward.*"]
    rows = [AblatedNorm(path, 0.1 * i, 0.01, 0.0, 1.0) for i, path in enumerate(paths)]
    axes = figures.cumulative_picture(rows).axes[0]
    line, *marks = axes.get_lines()[:4]
    np.testing.assert_allclose(line.get_xydata(), [(1, 0), (2, 0.1), (3, 0.2)])
    places = {mark.get_label(): mark.get_xydata().tolist() for mark in marks}
    assert places == {"attention": [[2, 0.1]], "feed-forward": [[3, 0.2]], "embedding, final": [[1, 0]]}


def test_the_gains_are_those_of_the_weights() -> None:
    model = tiny_model(4)
    figure = figures.gain_picture(lab.norms(model))
    for container, branch in zip(figure.axes[0].containers, ("attention", "feed_forward"), strict=True):
        weights = [getattr(layer, branch).pre_norm.weight.double().numpy() for layer in model.layers]
        middle, _, (bars,) = container
        np.testing.assert_allclose(middle.get_ydata(), [w.mean() for w in weights], rtol=1e-6)
        spans = [(segment[0, 1], segment[1, 1]) for segment in bars.get_segments()]
        np.testing.assert_allclose(spans, [(w.min(), w.max()) for w in weights], rtol=1e-6)


def test_massive_activations_are_drawn_over_the_median() -> None:
    recording = lab.capture(tiny_model(5), IDS)
    line, limit = figures.massive_picture(recording).axes[0].get_lines()
    after = [point.x for point in recording.resid.resid_post]
    ratios = [float(x.abs().max()) / np.sort(x.abs().numpy().ravel())[(x.numel() - 1) // 2] for x in after]
    np.testing.assert_allclose(line.get_ydata()[1:], ratios, rtol=1e-6)
    assert set(limit.get_ydata()) == {100}


def test_a_cost_far_above_the_others_does_not_flatten_them() -> None:
    rows = [SkippedLayer(f"layers.{i}", cost, 0.01, 0.0, 1.0, 0.1) for i, cost in enumerate([9.0, 0.01, -0.02, 0.03])]
    assert figures.skip_picture(rows).axes[0].get_yscale() == "symlog"
    assert figures.skip_picture(rows[1:]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("plan", [*PRESETS, *(pytest.param(plan, marks=pytest.mark.slow) for plan in MORE)])
def test_every_preset_can_be_drawn(plan: str, tmp_path: Path) -> None:
    model = tiny_model(1, norm_plan=plan)  # a warning of matplotlib's, such as a missing glyph, is an error here
    recording = lab.capture(model, IDS)
    norms = lab.norms(model)
    costs = [AblatedNorm(row.path, 0.1 * i, 0.01, 0.0, 1.0) for i, row in enumerate(norms)]
    drawn = [figures.residual_rms_picture(recording), figures.massive_picture(recording)]
    drawn.append(figures.norm_cost_picture(costs))
    if plan == "none":
        with pytest.raises(RequestError, match="no norm of a layer has a gain, so there is nothing to draw"):
            figures.gain_picture(norms)
    else:
        drawn.append(figures.gain_picture(norms))
    for i, figure in enumerate(drawn):
        save(figure, tmp_path / f"{i}.svg")
        ElementTree.parse(tmp_path / f"{i}.svg")


@pytest.mark.parametrize("page", [LIGHT, DARK])
def test_every_colour_stands_out_from_a_light_and_a_dark_page(page: str) -> None:
    for color in (*PALETTE, GREY):  # WCAG 2.2, 1.4.11: 3:1 for graphics
        bright, dim = sorted((luminance(color), luminance(page)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 3, color


def luminance(color: str) -> float:
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_the_same_bytes_each_time(suffix: str, tmp_path: Path) -> None:
    recording = lab.capture(tiny_model(), IDS)
    files = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for file in files:
        save(figures.residual_rms_picture(recording), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    assert (files[0].stat().st_mode & 0o777) != 0o600


def test_an_svg_follows_its_readers_light_or_dark(tmp_path: Path) -> None:
    save(figures.massive_picture(lab.capture(tiny_model(), IDS)), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    style = ElementTree.fromstring(text).find(f"{{{SVG}}}style")
    assert style is not None
    assert "prefers-color-scheme:dark" in str(style.text)
    assert text.count(INK) == 1
    assert "currentColor" in text
    assert text.count("http") == 1  # the namespace


def test_places_are_rounded_and_labels_are_not() -> None:
    figure, (axes,) = new_figure(1, 2.0)
    axes.plot([0.0001234, 1.0])
    log_scale(axes)
    text = svg(figure, "a")
    assert {"0.0001", "0.001", "0.01"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", text))
    places = re.findall(r'\bd="([^"]*)"', text)
    assert places
    assert not re.search(r"\d\.\d{3}", " ".join(places))


def test_what_cannot_be_saved_is_one_sentence(tmp_path: Path) -> None:
    figure = figures.massive_picture(lab.capture(tiny_model(), IDS))
    with pytest.raises(RequestError, match=r"a\.jpg: a picture is saved as \.png or \.svg"):
        save(figure, tmp_path / "a.jpg")
    with pytest.raises(RequestError, match=r"cannot write .*/no/a\.png: there is no folder .*/no; make it first"):
        save(figure, tmp_path / "no" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = lab.capture(tiny_model(), IDS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"pip install 'llama-mini\[lab\]'"):
        figures.residual_rms_picture(recording)


def test_a_picture_on_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.massive_picture(lab.capture(tiny_model(), IDS))

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RequestError, match=r"cannot write .*a\.png: No space left on device"):
        save(figure, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_importing_the_pictures_does_not_import_matplotlib() -> None:
    code = "import sys, llama_mini.lab.commands, llama_mini.lab.reporting.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_text_of_one_token_is_drawn_with_the_first_token_alone() -> None:
    (axes,) = figures.residual_rms_picture(lab.capture(tiny_model(), torch.tensor([5]))).axes
    assert "before a norm: the stream, first token" not in [line.get_label() for line in axes.get_lines()]
