"""audit: what it says of a norm is what happens when the norm's statistic is taken away by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.lab import ablate, audit, edit, fold, score
from llama_mini.lab.__main__ import main
from llama_mini.lab.auditing import cancels
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import select
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 20)
RMS = NormSpec()
QKV = BranchPlan(pre=RMS, q=RMS, k=NormSpec(view="full"), v=NormSpec(kind="l2"), out=RMS)
MID = BranchPlan(pre=RMS, mid=NormSpec(kind="scale"), out=NormSpec(kind="layer"))
SIMPLE = BranchPlan(gate=RMS, up=NormSpec(kind="scale"), out=RMS)
ATTENTION, FEED = "layers.1.attention", "layers.1.feed_forward"
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {  # plan, config, norms whose statistic cancels
    "llama": ("pre", {}, []),
    "normformer": ("normformer+qk+embed", {}, []),
    "post": ("post", {}, []),
    "post-final": (replace(NormPlan.parse("post", 2), final=NormSpec(kind="prms")), {}, [f"{FEED}.post_norm"]),
    "qkv": (NormPlan(attention=QKV, feed_forward=BranchPlan(pre=RMS)), {}, [f"{ATTENTION}.pre_norm"]),
    "qkv-parallel": (NormPlan(attention=QKV, parallel=True), {}, []),
    "qkv-biases": (NormPlan(attention=QKV), BIASES, []),
    "no-k": (NormPlan(attention=replace(QKV, k=None)), {}, []),
    "tanh-k": (NormPlan(attention=replace(QKV, k=NormSpec(kind="dyt"))), {}, []),
    "layer": (NormPlan(attention=replace(QKV, pre=NormSpec(kind="layer"))), {}, []),
    "mid": (NormPlan(attention=MID, feed_forward=MID), {}, [f"{ATTENTION}.mid_norm", f"{FEED}.mid_norm"]),
    "mid-biases": (NormPlan(attention=MID, feed_forward=MID), BIASES, []),
    "relu2": (NormPlan(feed_forward=MID), {"activation": "relu2"}, [f"{FEED}.pre_norm", f"{FEED}.mid_norm"]),
    "relu2-out": (
        NormPlan(feed_forward=replace(MID, mid=NormSpec(kind="dyt"), out=RMS)),
        {"activation": "relu2", "gated_mlp": False},
        [],
    ),
    "simple": ("simple", {}, [f"{FEED}.up_norm"]),
    "simple-biases": ("simple", BIASES, []),
    "simple-pre": (NormPlan(feed_forward=replace(SIMPLE, pre=RMS)), {}, [f"{FEED}.pre_norm", f"{FEED}.up_norm"]),
    "up": (NormPlan(feed_forward=replace(SIMPLE, pre=RMS, gate=None, out=None)), {}, []),
    "gate": (NormPlan(feed_forward=replace(SIMPLE, pre=RMS, up=None)), {}, [f"{FEED}.pre_norm"]),
    "gate-tanh": (NormPlan(feed_forward=replace(SIMPLE, pre=RMS, gate=NormSpec(kind="dyt"))), {}, [f"{FEED}.up_norm"]),
    "simple-relu2": (
        NormPlan(feed_forward=replace(SIMPLE, mid=RMS)),
        {"activation": "relu2"},
        [f"{FEED}.{name}_norm" for name in ("gate", "up", "mid")],
    ),
    "up-relu2": (
        NormPlan(feed_forward=replace(SIMPLE, pre=RMS, gate=None)),
        {"activation": "relu2", "gated_mlp": False},
        [f"{FEED}.pre_norm", f"{FEED}.up_norm"],
    ),
    "relu2-plain": ("peri", {"activation": "relu2", "gated_mlp": False}, [f"{FEED}.pre_norm"]),
}


def without_statistic(model: Llama, path: str) -> Tensor:
    """The logits if the norm only multiplies by its gain."""

    def hook(norm: Norm, args: tuple[Tensor], _: Tensor) -> Tensor:
        gain = effective_gain(norm)
        return args[0] * norm.scale * (1 if gain is None else gain)

    with model.get_submodule(path).register_forward_hook(hook):
        return model(TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_a_statistic_cancels_if_and_only_if_nothing_changes_without_it(case: str) -> None:
    plan, changes, expected = CASES[case]
    model = tiny_model(1, torch.float64, n_layers=2, norm_eps=0.0, norm_plan=plan, **changes)
    base = model(TOKENS)
    found = [path for path in select(model, None) if cancels(model, path)]
    assert [path for path in found if not path.startswith("layers.0.")] == expected
    for path in select(model, None):
        if model.get_submodule(path).kind != "dyt":
            change = float((without_statistic(model, path) - base).abs().max() / base.abs().max())
            assert (change < 1e-9) == (path in found), (path, change)
    for path in found:
        assert all(isinstance(model.get_submodule(later), Norm) for later in cancels(model, path))


def test_the_rows_are_those_of_ablate_and_folds_those_of_fold() -> None:
    plan = NormPlan(attention=replace(QKV, pre=NormSpec(gain="none")), feed_forward=MID)
    model = tiny_model(1, n_layers=1, norm_plan=plan)
    rows = audit(model, TOKENS)
    assert rows.column("path") == select(model, None)
    by_path = {row.path: row for row in rows}
    for row in rows:
        settings = {"skip": True} if row.kind in ("l2", "layer") else {"freeze": "quadratic", "keep": "none"}
        assert row.without == ("skipped" if "skip" in settings else "frozen")
        (cost,) = ablate(model, TOKENS, row.path, **settings)
        assert (row.dloss, row.se, row.kl, row.top1) == (cost.dloss, cost.se, cost.kl, cost.top1)
        assert row.can_go == (row.dloss + 2 * row.se <= 0.01)
        if row.folds is None:
            with pytest.raises(RequestError, match=r"cannot be folded|has no gain to fold"):
                fold(model, row.path)
        else:
            fold(model, row.path)
    assert by_path["layers.0.feed_forward.pre_norm"].folds == "gate_proj, up_proj"
    assert by_path["norm"].folds == "lm_head"
    first = by_path["layers.0.attention.pre_norm"]
    assert first.cancels == ", ".join(f"layers.0.attention.{name}_norm" for name in "qkv")
    assert first.folds is None


def test_what_cancels_costs_nothing_and_most_is_the_limit() -> None:
    plan = NormPlan(attention=QKV, feed_forward=BranchPlan(pre=RMS))
    model = tiny_model(1, n_layers=2, norm_plan=plan, norm_eps=1e-12)
    rows = audit(model, TOKENS)
    gone = [row for row in rows if row.cancels]
    assert [row.path for row in gone] == ["layers.0.attention.pre_norm", f"{ATTENTION}.pre_norm"]
    assert all(abs(row.dloss) < 1e-5 and row.can_go for row in gone)
    assert not all(row.can_go for row in rows)
    assert all(row.can_go for row in audit(model, TOKENS, most=100.0))
    base = score(model, TOKENS)
    with edit(model, {"norm": {"freeze": "quadratic", "keep": "none"}}, TOKENS):
        assert rows[-1].dloss == score(model, TOKENS, against=base).dloss


def test_refusals_and_the_command(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="the model has no norms to audit"):
        audit(tiny_model(norm_plan="none-final"), TOKENS)
    with pytest.raises(RequestError, match="most must be a finite number of at least 0, not -1"):
        audit(tiny_model(), TOKENS, most=-1)
    words = ["audit", "--model", str(tiny_dir), "--tokens", "24", "--json"]
    assert main([*words, "--most", "5"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["can_go"] for row in rows)
    assert {row["folds"] for row in rows} == {"q_proj, k_proj, v_proj", "gate_proj, up_proj", "lm_head"}
