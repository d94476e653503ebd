"""The diagram: a box for each slot of a plan, in the report's page too."""

import re
from pathlib import Path
from typing import Any

import pytest

from llama_mini.lab.reporting import report
from llama_mini.lab.reporting.diagram import Box, diagram, layer_kinds, ranges
from llama_mini.model.config import LlamaConfig
from llama_mini.model.norm_plan import NormPlan
from tests.tiny_models import random_tokens, tiny_model


def test_the_page_has_a_full_box_for_each_norm_and_a_dashed_one_for_each_empty_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the report needs the extra lab")
    monkeypatch.setattr(report, "_DIM", 16)  # random models and pictures play no part here
    monkeypatch.setattr(report, "svg", lambda *_: "")
    model = tiny_model(2, norm_plan="peri+qk:full")
    page = report.report(tmp_path / "a.html", model, random_tokens(1, 9)).read_text()
    boxes = re.findall(r'<span class="(\w+)">(\w+)', page)
    full = [name for look, name in boxes if look == "norm"]
    assert sorted(full) == ["k_norm", "norm", "out_norm", "out_norm", "pre_norm", "pre_norm", "q_norm"]
    empty = [name for look, name in boxes if look == "empty"]
    assert sorted(empty) == ["embed_norm", "gate_norm", *["mid_norm"] * 2, *["post_norm"] * 2, "up_norm", "v_norm"]
    assert page.count("<small>rms, full</small>") == 2


def test_layers_that_differ_are_drawn_apart() -> None:
    plan = NormPlan.parse("mix(.5)", 8)
    assert [(kind.name, kind.layers) for kind in layer_kinds(plan, 8)] == [("A", [0, 1, 2, 3]), ("B", [4, 5, 6, 7])]
    assert "A, attention, layers 0–3" in [column.title for column in diagram(config(norm_plan=plan, n_layers=8))]
    assert len(layer_kinds(NormPlan.parse("lns", 4), 4)) == 1
    assert Box("pre_norm", "rms, × 0.5–1", "norm") in boxes_of(norm_plan="lns", n_layers=4)
    assert Box("1.68 · x + branch", "", "sum") in boxes_of(norm_plan="deep", n_layers=4)


def test_the_feed_forward_layer_is_that_of_the_config() -> None:
    assert Box("gelu_tanh(gate) · up") in boxes_of(activation="gelu_tanh")
    plain = boxes_of(activation="relu2", gated_mlp=False)
    assert Box("relu2(up)") in plain
    assert Box("gate_proj") not in plain
    assert {box.name for box in plain if box.look == "empty"} >= {"up_norm"}
    assert "gate_norm" not in {box.name for box in plain}
    assert Box("gate_norm", "rms", "norm") in boxes_of(norm_plan="simple")
    assert Box("attention.pre_norm") in boxes_of(norm_plan="parallel")


def config(**settings: Any) -> LlamaConfig:
    return tiny_model(**settings).config


def boxes_of(**settings: Any) -> list[Box]:
    return [box for column in diagram(config(**settings)) for row in column.rows for box in row]


def test_layers_are_named_in_ranges() -> None:
    assert ranges([3]) == "layer 3"
    assert ranges([0, 1, 2, 5, 7, 8]) == "layers 0–2, 5, 7–8"
    assert ranges(range(0, 40, 2)) == "layers 0, 2, 4, 6, 8, 10 …"
