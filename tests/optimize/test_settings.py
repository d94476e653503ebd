"""Every setting of a model, one at a time: fast models against plain ones, and which layers an operator computes."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from llama_mini import Llama, LlamaConfig, NormPlan
from llama_mini.model.norm_slots import HEAD_SLOTS, ONLY_IN, SLOTS, BranchPlan, NormSpec
from llama_mini.model.rope_scaling import LinearScaling, YarnScaling
from tests.optimize.conftest import Seen, error, fast_of, plain_of, prompts, steps
from tests.optimize.test_equality import tolerance
from tests.tiny_models import random_tokens, tiny_model

WINDOW = {"sliding_window": 5, "sliding_layers": (1,)}
# Setting -> its value, what it needs beside it, and how many runs of the three layers an operator computes.
SETTINGS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "n_kv_heads": (3, {}, 1),
    "norm_eps": (0.3, {}, 1),
    "rope_theta": (9.0, {}, 1),
    "rope_scaling": (LinearScaling(factor=3.0), {}, 1),
    "rope_scaling: queries grow": (YarnScaling(factor=3.0, original_max_seq_len=4, q_growth=0.6), {}, 0),
    "rotary_dim": (4, {}, 1),
    "unrotated_layers": ((1,), {}, 1),
    "sliding_window": (5, {}, 1),
    "sliding_layers": ((1,), {"sliding_window": 5}, 1),
    "sliding_rope_theta": (9.0, WINDOW, 1),
    "sliding_rope_scaling": (LinearScaling(factor=3.0), {**WINDOW, "sliding_rope_theta": 50.0}, 1),
    "attention_scale": (1.5, {}, 1),
    "attention_scale: windows": (1.5, WINDOW, 1),
    "attention_softcap": (0.5, {}, 1),
    "qk_norm_after_rope": (True, {"norm_plan": "pre+qk"}, 0),
    "qkv_bias": (True, {}, 1),
    "o_bias": (True, {}, 1),
    "mlp_bias": (True, {}, 1),
    "activation": ("relu2", {}, 0),
    "gated_mlp": (False, {}, 0),
    "embedding_scale": (3.5, {}, 1),
    "logit_scale": (0.3, {}, 1),
    "logit_softcap": (0.7, {}, 1),
    "tie_word_embeddings": (True, {}, 1),
    "norm_plan": ("lns", {}, 1),  # the tests below change each part of it
}
SIZES = {"dim", "n_layers", "n_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"}
UNUSED = {"bos_id", "eos_ids", "pad_id"}  # by the model itself


def test_no_setting_is_left_out() -> None:
    assert {field.name for field in fields(LlamaConfig)} == {name.split(":")[0] for name in SETTINGS} | SIZES | UNUSED


def assert_equal(plain: Llama, quantize: str | None, kernels: str) -> None:
    fast = fast_of(plain, quantize, kernels)
    twin = plain_of(fast, plain)
    caches = [model.new_cache(2, 24) for model in (fast, twin)]
    found, expected = (
        [*prompts(model, cache, (17, 1)), steps(model, cache, 2)]
        for model, cache in zip((fast, twin), caches, strict=True)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < tolerance(torch.float32, quantize, kernels)


def model_with(name: str) -> tuple[Llama, dict[str, Any]]:
    """And its other settings."""
    value, others, _ = SETTINGS[name]
    return tiny_model(2, **others, **{name.split(":")[0]: value}), others


def differ(one: Llama, other: Llama) -> bool:
    tokens = random_tokens(1, 12)
    return error(one(tokens), other(tokens)) > 1e-2


@pytest.mark.parametrize("kernels", ["auto", pytest.param("off", marks=pytest.mark.slow)])
@pytest.mark.parametrize("quantize", [None, "mixed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_means_the_same_in_a_fast_model(name: str, quantize: str | None, kernels: str) -> None:
    plain, others = model_with(name)
    assert differ(plain, tiny_model(2, **others))
    assert_equal(plain, quantize, kernels)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_each_activation_with_a_gate_and_without(activation: str, gated: bool) -> None:
    assert_equal(tiny_model(3, activation=activation, gated_mlp=gated), "mixed", "auto")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_operator_computes_the_layers_that_it_can(name: str) -> None:
    fast = fast_of(model_with(name)[0])
    with Seen() as seen:
        steps(fast, fast.new_cache(2, 16), 1)
    assert seen.names.count("layers") == SETTINGS[name][2]


# --- the plan ---

NORM = NormSpec(eps=0.2)
NORMS: dict[str, NormSpec] = {
    "kind": NormSpec(kind="layer", eps=0.2),
    "eps": NormSpec(eps=0.5),
    "gain": NormSpec(eps=0.2, gain="1+w"),
    "cast": NormSpec(eps=0.2, cast="late"),
    "scale": NormSpec(eps=0.2, scale=0.5),
    "bias": NormSpec(kind="layer", eps=0.2, cast="late", bias=True),
    "view": NormSpec(eps=0.2, view="full"),
    "groups": NormSpec(kind="group", eps=0.2, groups=2),
    "power": NormSpec(kind="power", eps=0.2, power=0.5),
}
BRANCHES = {"alpha": 0.7, "beta": 1.3, "learned": True} | dict.fromkeys(SLOTS, NORM)
PLANS = {"embed": NORM, "final": None, "parallel": True}


def test_no_part_of_a_plan_is_left_out() -> None:
    assert {field.name for field in fields(NormSpec)} == set(NORMS)
    assert {field.name for field in fields(BranchPlan)} == set(BRANCHES)
    assert {field.name for field in fields(NormPlan)} == {"attention", "feed_forward", "overrides", *PLANS}


def plan_is_kept(changed: NormPlan, base: NormPlan) -> bool:
    """And says whether the change acts."""
    plain, before = (tiny_model(2, norm_plan=plan) for plan in (changed, base))
    assert_equal(plain, None, "auto")
    return differ(plain, before)


@pytest.mark.parametrize("part", PLANS)
def test_each_part_of_a_plan(part: str) -> None:
    base = NormPlan(attention=BranchPlan(pre=NORM))
    assert plan_is_kept(replace(base, **{part: PLANS[part]}), base)


@pytest.mark.parametrize(
    ("branch", "part"),
    [
        (branch, part)
        for branch in ("attention", "feed_forward")
        for part in BRANCHES
        if ONLY_IN.get(part, branch) == branch
    ],
)
def test_each_part_of_a_branch(branch: str, part: str) -> None:
    assert plan_is_kept(NormPlan(**{branch: BranchPlan(**{part: BRANCHES[part]})}), NormPlan())


@pytest.mark.parametrize(
    ("slot", "name"),
    [(slot, name) for slot in ("pre", "q", "k", "final") for name in NORMS if name != "view" or slot in HEAD_SLOTS],
)
def test_each_setting_of_a_norm_that_an_operator_computes(slot: str, name: str) -> None:
    attention = BranchPlan(pre=NORM, q=NORM, k=NORM)
    base = NormPlan(attention=attention, feed_forward=BranchPlan(pre=NORM), final=NORM)
    if slot == "final":
        changed = replace(base, final=NORMS[name])
    else:
        changed = replace(base, attention=replace(attention, **{slot: NORMS[name]}))
    assert plan_is_kept(changed, base) is (name != "cast")  # float32 has one rounding order
