"""The report: one HTML file that is whole, shows the lab's own numbers, and lets no text from a file become markup."""

import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser
from tqdm import tqdm

from llama_mini import lab
from llama_mini.errors import RequestError
from llama_mini.lab.ablation import AblatedNorm, Base, SkippedLayer
from llama_mini.lab.recording import capture
from llama_mini.lab.reporting import report as report_module
from llama_mini.lab.reporting.report import report
from llama_mini.lab.reporting.style import DARK, LIGHT, SVG
from llama_mini.lab.training import Race
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from tests.lab.reporting.pages import HOSTILE, HostileTokenizer, Page
from tests.server.browser import needs_chromium
from tests.tiny_models import TINY, random_tokens, tiny_model

pytest.importorskip("matplotlib", reason="the report needs the extra lab")
IDS = random_tokens(2, 20)
CURVES = {"pre": np.array([[4.0, 3.0], [4.2, 3.2]]), "post<b>": np.array([[4.0, 3.9], [4.1, np.nan]])}


@pytest.fixture(scope="module")
def massive() -> Llama:
    """A model whose layer 1 writes a huge dimension 7 for one token of the text."""
    model = tiny_model(2)
    seen: list[torch.Tensor] = []
    handle = model.layers[1].feed_forward.down_proj.register_forward_hook(lambda _, args, y: seen.append(args[0]))
    model(IDS)
    handle.remove()
    weight = model.layers[1].feed_forward.down_proj.weight
    inside = seen[0][1, 13]
    others = torch.cat([seen[0].flatten(0, 1)[:33], seen[0].flatten(0, 1)[34:]])
    free = inside - others.T @ torch.linalg.lstsq(others.T, inside[:, None]).solution[:, 0]  # no other token has it
    weight[7] += 5000 * free / (free @ inside)
    return model


@pytest.fixture(scope="module")
def written(massive: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "norms.html"
    found = report(path, massive, IDS, tokenizer=HostileTokenizer(), name=HOSTILE, race=Race(CURVES, 3.0, 1e-3))  # type: ignore[arg-type]
    assert found == path
    assert [file.name for file in path.parent.iterdir()] == ["norms.html"]
    return path


def test_the_page_is_well_formed_and_has_every_section(written: Path) -> None:
    page = Page(written)
    assert len(page.ids) == len(set(page.ids))
    assert page.headings == [
        "The checkpoint",
        "Every norm in its place",
        "Where the norms are",
        "The residual stream",
        "Massive activations",
        "What freezing each norm costs",
        "Gains",
        "What skipping each layer costs",
        "The doctor's findings",
        "Theory against measurement, at random init",
        "A race of plans",
    ]


def test_the_page_asks_for_nothing_from_outside(written: Path) -> None:
    page, text = Page(written), written.read_text()
    assert set(re.findall(r"\w+://[^\s\"'<]*", text)) <= {SVG}
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text  # the browser would refuse it
    assert not page.tags & {"link", "img", "iframe", "object"}


def test_text_from_files_never_becomes_markup(written: Path) -> None:
    page = Page(written)
    assert [script.get("type") for script in page.scripts] == ["application/json", None]
    assert "<script>alert" not in page.source
    assert "b" not in page.tags  # of a plan's name
    assert "<script>alert(1)</script>" in page.text
    assert "post<b>" in page.text


def test_the_numbers_are_those_of_the_lab(massive: Llama, written: Path) -> None:
    text = Page(written).text
    base = lab.score(massive, IDS)
    assert f"{base.loss:.4f} nats per token" in text
    costs = lab.ablate(massive, IDS)
    worst = max(costs, key=lambda row: row.dloss)
    assert f"The highest cost is that of {worst.path}, {worst.dloss:+.3g} ± {worst.se:.2g} nats per token" in text
    layers = lab.skip_layers(massive, IDS)
    dear = max(layers, key=lambda row: row.dloss)
    assert f"Skipping {dear.path} costs most, {dear.dloss:+.3g} ± {dear.se:.2g}" in text
    final = massive.norm.weight.double().numpy()
    assert f"norm has {final.min():.3g}, {final.mean():.3g} and {final.max():.3g}." in text
    off = lab.init("pre", TINY["n_layers"]).deviation(lab.predict("pre", TINY["n_layers"]))
    assert f"Largest deviation: {off['second_moment']:.1%} in the second moment" in text
    assert "post<b> diverged with at least one seed" in text
    assert "The lowest final loss is that of pre, 3.6 nats per byte" in text


def test_the_planted_massive_activation_is_found(massive: Llama, written: Path) -> None:
    found = capture(massive, IDS).massive()
    assert {(e.row, e.token, e.dim) for e in found} == {(1, 13, 7)}
    assert min(e.layer for e in found) == 1
    largest = max(found, key=lambda e: e.times_median)
    text = Page(written).text
    assert f"The largest massive activation is dimension 7 at token 13, {HOSTILE!r}" in text
    assert f", in the output of layer {largest.layer}:" in text
    cells = [re.findall("<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", written.read_text())]
    (row,) = [row for row in cells if len(row) == 9 and row[:2] == ["1", "13"]]
    assert row[3:6] == ["1–2", "1", "7"]
    x = capture(massive, IDS).resid.resid_post[largest.layer].x
    assert x is not None
    assert float(row[6].replace(",", "")) == pytest.approx(float(x[1, 13, 7]), rel=1e-3)
    assert float(row[7].replace(",", "")) == pytest.approx(float(x[1, 13, 7].abs() / x.abs().median()), rel=1e-3)
    assert row[8] == str(largest.layer)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models of width 16 in place of 256, where a test does not look at them."""
    monkeypatch.setattr(report_module, "_DIM", 16)


@pytest.mark.usefixtures("narrow")
def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model(6, norm_plan="peri+qk:full")
    before, tree = model(IDS), repr(model)
    report(tmp_path / "a.html", model, IDS)
    assert torch.equal(model(IDS), before)
    assert repr(model) == tree
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "A race of plans" not in Page(tmp_path / "a.html").headings


@pytest.mark.usefixtures("narrow")
def test_a_model_without_norms_or_prediction_is_reported(tmp_path: Path) -> None:
    text = Page(report(tmp_path / "a.html", tiny_model(norm_plan="none-final"), IDS)).text
    assert "No norm of this model is of kind rms or scale." in text
    assert "No norm of this model has a gain." in text
    text = Page(report(tmp_path / "c.html", tiny_model(norm_plan="none"), IDS)).text
    assert "No norm of the layers has a gain." in text
    rms = tiny_model().config.norm_plan.to_dict() | {"attention": {"pre": {"kind": "dyt"}}}
    text = Page(report(tmp_path / "b.html", tiny_model(norm_plan=NormPlan.from_dict(rms)), IDS)).text
    assert "There is no prediction:" in text
    assert "3 norms of other kinds are left out." in text


@pytest.mark.usefixtures("narrow")
def test_a_bfloat16_model_of_one_layer_is_reported(tmp_path: Path) -> None:
    model = tiny_model(n_layers=1, dtype=torch.bfloat16)
    text = Page(report(tmp_path / "a.html", model, IDS[0], calibrate=IDS[:, :7])).text
    assert "20 tokens in 1 row" in text
    assert "14 tokens in 2 rows" in text
    assert "bfloat16" in text


@pytest.mark.usefixtures("narrow")
def test_the_progress_bar_goes_through_all_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    def progress(**settings: Any) -> Any:
        bars.append(tqdm(**settings, file=StringIO()))
        return bars[-1]

    monkeypatch.setattr(report_module, "progress", progress)
    report(tmp_path / "a.html", tiny_model(2), IDS)
    (bar,) = bars
    assert bar.n == bar.total == 11 + 7 + 3  # sections, norms, layers


def test_a_failure_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.html"
    path.write_text("older")

    def fail(*_: object) -> None:
        raise RequestError("planted")

    monkeypatch.setattr(report_module, "doctor", fail)
    with pytest.raises(RequestError, match="planted"):
        report(path, tiny_model(), IDS)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "Base", None)
    with pytest.raises(RequestError, match=r"cannot write .*a\.html: there is no folder .*; make it first"):
        report(tmp_path / "no" / "a.html", tiny_model(), IDS)


@pytest.mark.parametrize("n_finite", [0, 1])
def test_costs_that_are_nan_are_said_and_not_taken_for_the_highest(
    n_finite: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, where, nan = tiny_model(), "NaN or infinity in the logits, first at norm, token 0", math.nan
    monkeypatch.setattr(report_module, "predict", lambda *_: (_ for _ in ()).throw(RequestError("no theory")))
    finite = AblatedNorm("layers.0.attention.pre_norm", -1, 0.1, 1, 1)
    frozen = [AblatedNorm("norm", nan, nan, nan, nan, error=where), finite]
    skipped = [SkippedLayer("layers.0", nan, nan, nan, nan, 0.1, where), SkippedLayer("layers.1", 2.5, 0.1, 1, 1, 0.1)]
    monkeypatch.setattr(Base, "frozen", lambda *_: [[row] * 3 for row in frozen[: 1 + n_finite]])
    monkeypatch.setattr(Base, "skipped", lambda *_: skipped[: 1 + n_finite])
    text = Page(report(tmp_path / "a.html", model, IDS)).text
    assert text.count("1 end in NaN or infinity, and have no cost.") == 2
    assert text.count(where) == 4  # a norm's three costs, and a layer's
    assert ("The highest cost is that of layers.0.attention.pre_norm, -1 ± 0.1 nats" in text) is bool(n_finite)
    assert ("Skipping layers.1 costs most, +2.5 ± 0.1 nats" in text) is bool(n_finite)


# --- in a browser ---


@needs_chromium
def test_the_page_is_drawn_in_light_and_dark_and_does_not_scroll_sideways(
    browser: Browser, written: Path, tmp_path: Path
) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    for scheme, page in (("light", LIGHT), ("dark", DARK)):
        window = browser.new_page(viewport={"width": 1000, "height": 2400}, color_scheme=scheme)  # type: ignore[arg-type]
        window.goto(written.as_uri())
        window.screenshot(path=shot)
        pixels = (imread(shot)[..., :3] * 255).round().astype(int)
        ground = [int(page[i : i + 2], 16) for i in (1, 3, 5)]
        different = (np.abs(pixels - ground).max(-1) > 60).mean(1)  # by line of the picture
        assert (pixels[0, 0] == ground).all()
        assert 0.2 < (different > 0.001).mean() < 0.98
        assert different.mean() < 0.3
        for width in (340, 1200):
            window.set_viewport_size({"width": width, "height": 900})
            for element in ("documentElement", "body"):
                assert window.evaluate(f"document.{element}.scrollWidth") <= width
        window.close()
