"""The explorer: its map holds every norm, its facts are the lab's numbers, and its script shows them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from llama_mini import lab
from llama_mini.errors import RequestError
from llama_mini.lab.ablation import AblatedNorm
from llama_mini.lab.attention_heads import attention
from llama_mini.lab.editing import edited_norms
from llama_mini.lab.reporting import report as report_module
from llama_mini.lab.reporting.explorer import KEEPS, explore
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from tests.lab.reporting.pages import HostileTokenizer, Page
from tests.server.browser import needs_chromium
from tests.tiny_models import random_tokens, tiny_model

pytest.importorskip("matplotlib", reason="the report needs the extra lab")
IDS, OTHER = random_tokens(2, 20), [random_tokens(1, 30, seed=5)[0], random_tokens(1, 9, seed=6)[0]]
PATH = "layers.1.attention.pre_norm"
APART = {"none": "no token apart", "first": "first token apart", "massive": "massive tokens apart"}


@pytest.fixture(scope="module")
def model() -> Llama:
    made = tiny_model(3, norm_plan="peri+qk")
    made.layers[0].feed_forward.out_norm.weight[5] *= 3000  # massive, for all tokens
    made.tok_embeddings.weight[IDS[0, 4]] *= 30  # a token above 2.5 times the median
    return made


@pytest.fixture(scope="module")
def written(model: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "predict", fail)  # random models and pictures play no part here
        patch.setattr(report_module, "svg", lambda *_: "")
        path = tmp_path_factory.mktemp("explorer") / "norms.html"
        return report_module.report(path, model, IDS, calibrate=OTHER, tokenizer=HostileTokenizer())  # type: ignore[arg-type]


def fail(*_: object) -> None:
    raise RequestError("no theory")


def explored(model: Llama, costs: dict[str, dict[str, AblatedNorm]] | None = None) -> dict[str, Any]:
    return explore(model, lab.capture(model, IDS), None, costs or {}, attention(model, IDS), None)


def test_the_facts_are_the_numbers_of_the_lab(model: Llama, written: Path) -> None:
    norms = Page(written).data["norms"]
    assert list(norms) == lab.norms(model).column("path")
    recording, folded = lab.capture(model, IDS), {row.path: row for row in lab.folded_gains(model).table()}
    for path, norm in norms.items():
        facts, gain = norm["facts"], model.get_submodule(path).weight.double().numpy()
        low, middle, high = (f"{value:.4g}" for value in (gain.min(), np.median(gain), gain.max()))
        assert (
            facts["gain"]
            == f"min {low} (dimension {gain.argmin()}), median {middle}, max {high} (dimension {gain.argmax()})"
        )
        assert norm["gain"]["counts"] == np.histogram(gain.astype(np.float32), 32)[0].tolist()
        assert ("gain after folding" in facts) is (path in folded)
        if path in folded:
            row = folded[path]
            assert (
                f"min {row.min:.4g} (dimension {row.min_dim}), median {row.median:.4g}" in facts["gain after folding"]
            )
        record = recording[path]
        assert facts["RMS of its input"] == f"first token {record.first:.4g}, median of the others {record.median:.4g}"
        assert record.x is not None
        energy = np.square(record.x.double().numpy()).reshape(2, 20, -1).mean(-1)
        np.testing.assert_allclose(norm["rms"], np.sqrt(energy[0]), rtol=6e-4)
        massive = np.argwhere(np.sqrt(energy) > 2.5 * np.median(np.sqrt(energy))).tolist()
        assert facts["tokens above 2.5 times the median"].startswith(f"{len(massive)}: text " if massive else "none")
    assert norms["layers.0.attention.pre_norm"]["facts"]["tokens above 2.5 times the median"] != "none"


@pytest.mark.parametrize("keep", KEEPS)
def test_the_costs_are_those_of_ablate(keep: str, model: Llama, written: Path) -> None:
    page = Page(written)
    for row in lab.ablate(model, IDS, keep=keep):
        text = page.data["norms"][row.path]["facts"][f"cost, {APART[keep]}"]
        assert text.startswith(f"{row.dloss:+.4g} ± {row.se:.2g}")
        assert ("within two standard errors" in text) is (abs(row.dloss) <= 2 * row.se)
        link = page.source[page.source.index(f'<a href="#{row.path}"') :]
        look = re.search(rf'<span class="{keep} (\w+)">([^<]*)', link)
        assert look is not None
        assert (look[1] == "grey") is (abs(row.dloss) <= 2 * row.se)
        assert float(look[2]) == pytest.approx(row.dloss, abs=0.051 if abs(row.dloss) >= 1 else 6e-4)


@pytest.mark.parametrize("keep", KEEPS)
def test_the_constants_are_those_that_freezing_divides_by(keep: str, model: Llama, written: Path) -> None:
    norms = Page(written).data["norms"]
    for freeze in ("quadratic", "arithmetic", "median"):
        settings = {"freeze": freeze, "keep": keep}
        frozen = [edited_norms(model, dict.fromkeys(norms, settings), IDS, other) for other in (None, OTHER)]
        for path, norm in norms.items():
            texts = norm["facts"][f"constant, {APART[keep]}"].split("; of the other text ")
            for text, modules in zip(texts, frozen, strict=True):
                means = dict(mean.split() for mean in text.split(", "))
                assert float(means[freeze]) == pytest.approx(1 / float(modules[path].inverse_root), rel=6e-4)


def test_the_facts_of_a_layer_are_those_of_attention_and_capture(model: Llama, written: Path) -> None:
    layers = Page(written).data["layers"]
    heads, recording = lab.attention(model, IDS), lab.capture(model, IDS)
    massive = recording.massive()
    assert {row.layer for row in massive} >= {0}
    for i, layer in enumerate(layers):
        masses = [row.first_mass for row in heads if row.layer == i]
        np.testing.assert_allclose(layer["heads"], masses, atol=5e-5)
        facts = list(layer["facts"].values())
        assert facts[0] == (
            f"RMS: first token {recording.resid.resid_pre[i].first:.4g}, "
            f"median of the others {recording.resid.resid_pre[i].median:.4g}"
        )
        assert facts[1] == f"mean {np.mean(masses):.3g}, heads from {min(masses):.2g} to {max(masses):.2g}"
        own = [row for row in massive if row.layer == i]
        assert facts[2].startswith(f"{len(own)}; the largest is dimension 5 of token text " if own else "none")


def test_all_is_in_tables_without_script(written: Path) -> None:
    page = Page(written)
    facts = [norm["facts"] for norm in page.data["norms"].values()] + [x["facts"] for x in page.data["layers"]]
    for text in {text for one in facts for text in one.values()}:
        assert " ".join(text.split()) in page.text
    assert set(page.data["norms"]) <= set(page.ids)
    assert [link for link in page.links if link[1:] in page.data["norms"]] == [
        f"#{path}" for path in page.data["norms"]
    ]


@pytest.mark.parametrize(
    "plan", ["pre", "post", "peri+qk:full", "sub+embed", "normformer", "mix(.5)", "parallel", "none", "none-final"]
)
def test_the_map_has_every_norm_in_the_order_of_the_forward_pass(plan: str) -> None:
    model = tiny_model(norm_plan=plan)
    explorer = explored(model)
    cells = [cell for row in explorer["rows"] for cell in (row["cells"] or [row["end"]])]
    paths = [cell["path"] for cell in cells if isinstance(cell, dict)]
    assert paths == lab.norms(model).column("path") == list(explorer["data"]["norms"])
    assert cells.count("x + branch") == 2 * len(model.layers)
    for path, norm in explorer["data"]["norms"].items():
        name = path.rpartition(".")[2]
        assert sum(name in step for step in norm["place"]) == 1
    json.dumps(explorer["data"], allow_nan=False)


def test_the_place_of_a_norm_is_told_by_the_steps_around_it() -> None:
    norms = explored(tiny_model(norm_plan="peri+qk"))["data"]["norms"]
    heads = ["q_proj", "k_proj", "v_proj"], ["q_norm", "k_norm"]
    assert norms[PATH]["place"] == [["x"], ["pre_norm"], *heads, ["attend"], ["o_proj"], ["out_norm"], ["x + branch"]]
    deep = explored(tiny_model(norm_plan="deep", activation="relu2", gated_mlp=False))["data"]["norms"]
    inside = [["up_proj"], ["relu2(up)"], ["down_proj"]]
    assert deep["layers.0.feed_forward.post_norm"]["place"] == [
        ["x"],
        *inside,
        ["1.41 · x + branch"],
        ["post_norm"],
    ] or (deep["layers.0.feed_forward.post_norm"]["place"][1:4] == inside)
    parallel = explored(tiny_model(norm_plan="parallel"))["rows"][1]["cells"]
    assert [type(cell) for cell in parallel] == [dict, str, str]


def test_what_is_not_measured_is_said() -> None:
    model = tiny_model(norm_plan=NormPlan.parse("pre", 2).with_norms(kind="layer", gain="none"))
    facts = explored(model)["data"]["norms"][PATH]["facts"]
    assert facts["cost of freezing"] == "a norm of kind layer cannot be frozen"
    assert "gain" not in facts
    assert "gain none" in facts["settings"]
    nan, where = math.nan, "NaN or infinity in the logits, first at norm, token 0"
    failed = {keep: {PATH: AblatedNorm(PATH, nan, nan, nan, nan, error=where)} for keep in KEEPS}
    explorer = explored(tiny_model(), failed)
    assert explorer["data"]["norms"][PATH]["facts"]["cost, first token apart"] == where
    assert explorer["rows"][2]["cells"][0]["looks"] == [(keep, "c3", "NaN") for keep in KEEPS]
    moved = tiny_model()
    with lab.edit(moved, {"norm": {"eps": 1e-3}}):
        assert "edited" in explored(moved)["why_not_folded"]


def test_a_cost_within_two_standard_errors_is_grey() -> None:
    costs = {"first": {PATH: AblatedNorm(PATH, 0.5, 0.25, 0, 1), "norm": AblatedNorm("norm", 0.5, 0.24, 0, 1)}}
    rows = explored(tiny_model(), costs)["rows"]
    assert rows[2]["cells"][0]["looks"][1] == ("first", "grey", "+.500")
    assert rows[-1]["end"]["looks"][1] == ("first", "c2", "+.500")


@needs_chromium
def test_the_script_shows_what_one_points_at_clicks_and_moves_to(browser: Browser, written: Path) -> None:
    """Runs the page, and compares what the panel says with the data, after each event."""
    probe = """() => {
      const seen = [], panel = document.getElementById("panel"), map = document.getElementById("map");
      const link = path => map.querySelector(`a[href="#${path}"]`);
      const note = () => seen.push([panel.querySelector("h3").textContent, document.activeElement.getAttribute("href"),
        panel.textContent, panel.querySelectorAll("svg").length]);
      const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      note();
      link("layers.1.attention.pre_norm").dispatchEvent(new MouseEvent("mousemove", {bubbles: true})); note();
      map.dispatchEvent(new MouseEvent("mouseleave")); note();
      link("layers.0.attention.q_norm").click(); note();
      for (const name of ["ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowUp"]) { press(name); note(); }
      panel.querySelectorAll("button")[1].click(); note();
      return seen;
    }"""
    window = browser.new_page()
    window.goto(written.as_uri())
    seen, found = window.evaluate(probe), Page(written)
    q, k = "layers.0.attention.q_norm", "layers.0.attention.k_norm"
    first, below = "layers.0.attention.pre_norm", "layers.1.attention.q_norm"
    beside = "layers.1.attention.k_norm"
    assert [one[0] for one in seen] == [first, PATH, first, q, below, beside, k, q, q, below]
    assert [one[1] and one[1][1:] for one in seen[3:9]] == [q, below, beside, k, q, q]
    for path, _, text, charts in seen:
        norm = found.data["norms"][path]
        assert all(fact in text for fact in norm["facts"].values())
        assert all(fact in text for fact in found.data["layers"][norm["row"] - 1]["facts"].values())
        assert charts == 3 + (norm["folded"] is not None)
