"""The doctor on models in memory, and on what their norms see in a text."""

from typing import Any

import pytest
import torch

from llama_mini.lab import doctor, fold
from llama_mini.lab.diagnosis import Finding
from llama_mini.lab.table import Table
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.oracles import same_bits
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 33)


def only(found: Table[Finding]) -> Finding:
    assert len(found) == 1, str(found)
    return found[0]


def test_an_eps_of_one_norms_own_is_named_by_its_path() -> None:
    plan = NormPlan.parse("pre", 3)
    own = BranchPlan(pre=NormSpec(eps=0.5))
    model = tiny_model(1, norm_plan=plan.with_layers([plan.layer(0), (own, plan.feed_forward), plan.layer(2)]))
    assert only(doctor(model)).path == "layers.1.attention.pre_norm"


def test_gains_above_one_are_healthy_in_heads_and_final_norm_and_near_one_everywhere() -> None:
    """As the final norm of the default checkpoint has them, and as a short training leaves all of them."""
    model = tiny_model(1, norm_plan="pre+qk")
    for name, norm in model.named_modules():
        if isinstance(norm, Norm) and (name == "norm" or name.endswith(("q_norm", "k_norm"))):
            norm.weight += 1
    assert len(doctor(model)) == 0
    for norm in (module for module in model.modules() if isinstance(module, Norm)):
        norm.weight.copy_(torch.linspace(0.98, 1.05, norm.dim))
    assert len(doctor(model)) == 0


def test_a_model_without_any_training_gets_a_note() -> None:
    for model in (fold(tiny_model()), Llama(tiny_model().config)):
        row = only(doctor(model))
        assert (row.severity, row.path) == ("note", "every norm")


def scaled(factor: float, **changes: Any) -> Llama:
    """A model whose embedding is `factor` times as large."""
    model = tiny_model(1, **changes)
    model.tok_embeddings.weight *= factor
    return model


def test_eps_larger_than_what_a_norm_sees() -> None:
    assert len(doctor(scaled(1, norm_eps=1e-5), TOKENS)) == 0
    row = only(doctor(scaled(1e-3, norm_eps=1e-5), TOKENS))
    assert (row.severity, row.path) == ("warning", "layers.0.attention.pre_norm")
    model = scaled(1e-3)
    smallest = float(model.tok_embeddings(TOKENS).pow(2).mean(-1).min())
    kept = (smallest / (smallest + 1e-5)) ** 0.5
    assert row.finding == f"eps 1e-05 exceeds its input's mean square, {smallest:.3g}: {kept:.0%} of a row is left"


@pytest.mark.parametrize(("kind", "speaks"), [("layer", True), ("l2", False), ("prms", True), ("dyt", False)])
def test_eps_is_held_against_what_it_is_added_to(kind: str, speaks: bool) -> None:
    """A row of one value has no variance; 48 squares of 0.003 sum to 4.3e-4; prms sees the first three elements."""
    branch = BranchPlan(pre=NormSpec(kind=kind, eps=1e-5))
    model = tiny_model(1, norm_plan=NormPlan(attention=branch, feed_forward=branch), vocab_size=97)
    model.tok_embeddings.weight.fill_(0.003 if kind != "layer" else 1.0)
    if kind == "prms":
        model.tok_embeddings.weight.fill_(1.0)[:, :3] = 1e-4
    found = [row for row in doctor(model, TOKENS) if "eps" in row.finding]
    assert [row.path for row in found[:1]] == (["layers.0.attention.pre_norm"] if speaks else [])


def test_a_stream_that_float16_cannot_hold() -> None:
    assert len(doctor(scaled(5e3), TOKENS)) == 0
    found = doctor(scaled(5e4), TOKENS)
    assert len(found) == 7  # the stream goes past every norm
    largest = float(scaled(5e4).tok_embeddings(TOKENS).abs().max())
    assert found[0].finding == f"it reads or returns {largest:,.0f}; float16 ends at 65,504"
    assert set(found.column("severity")) == {"warning"}
    overflowed = doctor(scaled(5e4, dtype=torch.float16), TOKENS)
    assert overflowed[0].severity == "error"
    assert overflowed[0].finding == "it reads or returns NaN or infinity"


def test_an_input_that_float16_cannot_hold() -> None:
    model = scaled(2e-5, norm_eps=0.0)
    found = [row for row in doctor(model, TOKENS) if "eps" not in row.finding]
    assert [row.path for row in found] == ["layers.0.attention.pre_norm"]
    assert "underflows in float16" in found[0].finding


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(1)
    before = model(TOKENS)
    doctor(model, TOKENS)
    assert not any(module._forward_hooks for module in model.modules())
    assert same_bits(model(TOKENS), before)


def test_large_gains_are_not_taken_for_gains_with_one_added_twice() -> None:
    plan = NormPlan.parse("peri", 3).with_norms(gain="1+w", cast="late")
    for added, expected in ((0.0, 4), (1.0, 0)):  # effective gains from 1.5 to 2.5, or beyond 2 as in Gemma 3
        model = tiny_model(norm_plan=plan)
        for norm in (module for module in model.modules() if isinstance(module, Norm)):
            norm.weight += added
        assert sum("added twice" in row.finding for row in doctor(model)) == expected  # one for each slot
