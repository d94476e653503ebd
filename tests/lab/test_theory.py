"""The predictor against brute-force integrals, hand-worked formulas, and samples; its refusals."""

import json
import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from llama_mini import NormPlan
from llama_mini.errors import ConfigError, RequestError
from llama_mini.lab import predict
from llama_mini.lab.theory import Profile, act_moments
from llama_mini.model.feed_forward import ACTIVATIONS
from llama_mini.model.norm_plan import Override
from llama_mini.model.norm_slots import BranchPlan, NormSpec

SILU = 0.355775520  # E[silu(z)²], z ~ N(0, 1)
SLOPE = 0.379482352  # E[silu'(z)²]
EXACT = 3e-5  # eps = 1e-5 in each norm is seen


def hermite(h: float, activation: Any = "silu") -> tuple[float, float]:
    """The two integrals by Gauss-Hermite quadrature, of other nodes than the predictor's grid; slopes by autograd."""
    z, weight = hermegauss(180)
    x = torch.from_numpy(math.sqrt(h) * z).requires_grad_()
    y: Tensor = ACTIVATIONS[activation](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return tuple(np.average(values.detach().numpy() ** 2, weights=weight) for values in (y, slope))


def test_the_two_integrals() -> None:
    np.testing.assert_allclose(act_moments("silu", 1.0), (SILU, SLOPE), atol=6e-10)
    for activation, h in product(ACTIVATIONS, (0.01, 0.3, 2.0)):
        kink = 1e-3 if activation == "relu2" else 1e-8  # the quadrature is made for smooth functions
        np.testing.assert_allclose(act_moments(activation, h), hermite(h, activation), rtol=kink, err_msg=activation)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_integrals_tend_to_those_of_a_ramp(activation: Any) -> None:
    moment, slope = act_moments(activation, 1e12)
    np.testing.assert_allclose((moment / 1e12, slope), (0.5, 0.5), rtol=1e-3)


def test_without_a_gate_the_activation_alone_counts() -> None:
    """relu² of N(0, h): E = 3h²/2 and E of the squared slope 2h; with h = 1 before each branch."""
    plan = NormPlan(attention=BranchPlan(beta=0.0), feed_forward=BranchPlan(pre=NormSpec(eps=0.0)))
    profile = predict(plan, 2, activation="relu2", gated=False)
    np.testing.assert_allclose(profile.second_moment, [1, 2.5, 4], rtol=1e-12)
    np.testing.assert_allclose(profile.gradient, np.sqrt([3 * (1 + 2 / 2.5), 1 + 2 / 2.5, 1]), rtol=1e-12)


def test_a_parallel_layer_adds_what_both_branches_make_of_its_input() -> None:
    """S grows by f₁ + f₂, both of the normed input, and G = 1 + (g₁ + g₂)/S: neither passes through the other."""
    s = 1 + (1 + SILU) * np.arange(5)
    profile = predict("parallel", 4)
    np.testing.assert_allclose(profile.second_moment, s, rtol=EXACT)
    growth = 1 + (1 + SILU + SLOPE) / s[:-1]
    np.testing.assert_allclose(profile.gradient, np.sqrt([*np.cumprod(growth[::-1])[::-1], 1]), rtol=EXACT)


def test_an_activation_that_is_none() -> None:
    with pytest.raises(RequestError, match=r"layers\.0\.feed_forward\.gate_norm needs a gate, and the feed-forward"):
        predict("simple", 2, gated=False)
    with pytest.raises(RequestError, match="unknown activation 'swish'; known: silu, gelu_tanh, gelu, relu2"):
        predict("pre", 2, activation="swish")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "moments"),
    [
        ("pre", 1 + (1 + SILU) * np.arange(9)),
        ("pre+qk", 1 + (1 + SILU) * np.arange(9)),
        ("peri", 1 + 2.0 * np.arange(9)),
        ("out", 1 + 2.0 * np.arange(9)),
        ("out+qk:full", 1 + 2.0 * np.arange(9)),
        ("sub", 1 + 2.0 * np.arange(9)),
        ("normformer", 1 + 2.0 * np.arange(9)),
        ("post", np.ones(9)),
        ("deep", np.ones(9)),
    ],
)
def test_second_moments_in_closed_form(plan: str, moments: np.ndarray) -> None:
    np.testing.assert_allclose(predict(plan, 8).second_moment, moments, rtol=EXACT)


def test_second_moment_of_layer_norm_scaling() -> None:
    """Layer l, from 1, gives both its branches an input of second moment 1/l."""
    steps = [(1 + hermite(1 / layer)[0]) / layer for layer in range(1, 9)]
    np.testing.assert_allclose(predict("lns", 8).second_moment, 1 + np.cumsum([0, *steps]), rtol=EXACT)


def test_gradient_of_a_feed_forward_whose_input_is_not_unit() -> None:
    branch = BranchPlan(pre=NormSpec(eps=0.0, scale=1.5))
    silu, slope = hermite(2.25)
    profile = predict(NormPlan(attention=BranchPlan(beta=0.0), feed_forward=branch), 1)
    np.testing.assert_allclose(profile.second_moment, [1, 1 + 2.25 * silu], rtol=1e-8)
    np.testing.assert_allclose(profile.gradient, [math.sqrt(1 + 2.25 * (2.25 * slope + silu)), 1], rtol=1e-8)


def test_gradient_of_post_grows_toward_the_input() -> None:
    """y = 2, G = 2/2 in attention; y = 1 + E[silu²], G = (1 + E[silu'²] + E[silu²])/y in the feed-forward."""
    growth = (1 + SLOPE + SILU) / (1 + SILU)
    expected = np.sqrt(growth) ** np.arange(6, -1, -1)
    np.testing.assert_allclose(predict("post", 6).gradient, expected, rtol=10 * EXACT)
    assert expected[0] > 2


def test_gradient_and_angle_of_pre() -> None:
    """Every sublayer adds to the stream; its gradient grows by 1 + g/S."""
    gradient, angle = [1.0], []
    for layer in reversed(range(5)):
        s = 1 + layer * (1 + SILU)
        gradient.append(gradient[-1] * math.sqrt((1 + 1 / s) * (1 + (SILU + SLOPE) / (s + 1))))
        angle.append(math.acos(math.sqrt(s / (s + 1)) * math.sqrt((s + 1) / (s + 1 + SILU))) / math.pi)
    profile = predict("pre", 5)
    np.testing.assert_allclose(profile.gradient, gradient[::-1], rtol=EXACT)
    np.testing.assert_allclose(profile.angle, angle[::-1], rtol=EXACT)


def test_gradient_behind_v_mid_and_out_norms() -> None:
    """A norm of unit output divides the gradient by what it divided the signal by, wherever it sits in the branch."""
    norm = NormSpec(eps=0.0)
    for slot in ("v", "mid", "out"):
        attention = BranchPlan(**{slot: norm})
        profile = predict(NormPlan(attention=attention, feed_forward=BranchPlan(beta=0.0)), 2)
        np.testing.assert_allclose(profile.second_moment, [1, 2, 3], rtol=1e-12)
        np.testing.assert_allclose(profile.gradient, np.sqrt([2 * 1.5, 1.5, 1]), rtol=1e-12)  # 1 + 1/S


def test_residual_scales_eps_and_the_scale_of_a_norm() -> None:
    attention = BranchPlan(pre=NormSpec(eps=0.25, scale=3.0), alpha=0.5, beta=2.0)
    profile = predict(NormPlan(attention=attention, feed_forward=BranchPlan(beta=0.0)), 1)
    np.testing.assert_allclose(profile.second_moment, [1, 0.25 + 4 * 9 / 1.25], rtol=1e-12)
    np.testing.assert_allclose(profile.gradient, [math.sqrt(0.25 + 4 * 9 / 1.25), 1], rtol=1e-12)
    np.testing.assert_allclose(profile.angle, [math.acos(0.5 / math.sqrt(29.05)) / math.pi], rtol=1e-12)


def test_embedding_norm_and_final_norm() -> None:
    plan = NormPlan(attention=BranchPlan(), feed_forward=BranchPlan(beta=0.0), embed=NormSpec(scale=3.0))
    np.testing.assert_allclose(predict(plan, 2).second_moment, [9, 18, 36], rtol=2 * EXACT)
    for text in ("peri", "pre"):
        np.testing.assert_array_equal(predict(f"{text}-final", 3).gradient, predict(text, 3).gradient)


def test_an_override_holds_in_its_layers_alone() -> None:
    plan = NormPlan.parse("pre", 4)
    silent = BranchPlan(beta=0.0)
    plan = replace(plan, overrides=(Override(first=1, last=2, attention=silent, feed_forward=silent),))
    step = 1 + SILU
    np.testing.assert_allclose(predict(plan, 4).second_moment, 1 + step * np.array([0, 1, 1, 1, 2]), rtol=EXACT)
    np.testing.assert_array_equal(predict(plan, 4).angle[1:3], 0)


def test_mix_changes_over() -> None:
    mixed = predict("mix(.25)", 8)
    np.testing.assert_array_equal(mixed.second_moment[:3], predict("post", 8).second_moment[:3])
    np.testing.assert_allclose(mixed.second_moment[2:], predict("pre", 6).second_moment, rtol=EXACT)


@pytest.mark.parametrize("kind", ["layer", "scale", "group", "power"])
def test_kinds_that_equal_rms_at_init(kind: str) -> None:
    def plan(kind: str) -> NormPlan:
        branch = BranchPlan(pre=NormSpec(kind=kind), post=NormSpec(kind=kind))
        return NormPlan(attention=branch, feed_forward=branch)

    np.testing.assert_array_equal(predict(plan(kind), 3).gradient, predict(plan("rms"), 3).gradient)


def test_powers_and_frozen_norms() -> None:
    """h = S^(1 - p) before attention, b = S^-p: G = 1 + S^-p and S grows by S^(1 - p). Frozen at one: no norm."""
    half = NormSpec(kind="power", power=0.5, eps=0.0, scale=2.0)
    silent = BranchPlan(beta=0.0)
    profile = predict(NormPlan(attention=BranchPlan(pre=half), feed_forward=silent), 2)
    one, two = 5.0, 5.0 + 4 * math.sqrt(5)
    np.testing.assert_allclose(profile.second_moment, [1, one, two], rtol=1e-12)
    growth = [1 + 4, 1 + 4 / math.sqrt(5)]
    np.testing.assert_allclose(profile.gradient, np.sqrt([growth[0] * growth[1], growth[1], 1]), rtol=1e-12)
    frozen = NormPlan(attention=BranchPlan(pre=NormSpec(kind="frozen", scale=3.0)), feed_forward=silent)
    np.testing.assert_allclose(predict(frozen, 2).second_moment, [1, 10, 100], rtol=1e-12)


@pytest.mark.parametrize("slot", ["pre", "v", "mid", "out", "post"])
@pytest.mark.parametrize("kind", ["l2", "prms", "crms", "dyt", "derf"])
def test_other_kinds_are_refused_by_address(kind: str, slot: str) -> None:
    plan = NormPlan(attention=BranchPlan(**{slot: NormSpec(kind=kind)}))
    with pytest.raises(RequestError, match=rf"layers\.0\.attention\.{slot}_norm is of kind '{kind}'"):
        predict(plan, 2)


def test_kinds_of_q_k_and_final_norms_do_not_matter() -> None:
    odd = NormSpec(kind="dyt")
    plan = NormPlan.parse("peri", 3)
    strange = replace(plan, attention=replace(plan.attention, q=odd, k=odd), final=odd)
    np.testing.assert_array_equal(predict(strange, 3).gradient, predict(plan, 3).gradient)


def test_no_norm_squares_the_stream_until_it_overflows() -> None:
    profile = predict("none", 12)
    logs = np.log(profile.second_moment[3:9])
    np.testing.assert_allclose(np.diff(logs) / logs[:-1], 1, atol=0.1)  # S² a layer, nearly
    assert np.isinf(profile.second_moment[-1])
    assert np.isinf(profile.gradient[0])


@pytest.mark.parametrize("depth", [0, -1, 1.0, True, 1001, 10**400, "2", None])
def test_a_depth_that_is_none(depth: object) -> None:
    with pytest.raises(RequestError, match="depth must be a whole number from 1 to 1000"):
        predict("pre", depth)  # type: ignore[arg-type]


def test_what_is_no_plan() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'sandwich'"):
        predict("sandwich", 2)
    with pytest.raises(RequestError, match="a plan must be a NormPlan or the text of one"):
        predict(3, 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layers 0-4 in a model of 3"):
        predict(NormPlan(overrides=(Override(first=0, last=4),)), 3)


def test_the_deviation_is_the_largest_of_each_field_and_nan_stays() -> None:
    base = predict("peri", 6)
    fields = {"second_moment": 0.0, "gradient": 0.0, "angle": 0.0}
    assert base.deviation(base) == fields
    for name, off in {"second_moment": 0.04, "gradient": -0.055, "angle": 0.03}.items():
        values = getattr(base, name).copy()
        values[2] *= 1 + off
        assert replace(base, **{name: values}).deviation(base) == fields | {name: pytest.approx(abs(off))}
    assert np.isnan(replace(base, angle=base.angle * np.nan).deviation(base)["angle"])
    with pytest.raises(RequestError, match="profiles of 6 and 5 layers"):
        base.deviation(predict("peri", 5))


def test_json_table_and_repr() -> None:
    profile = predict("none", 12)
    data = json.loads(profile.to_json())
    assert data["plan"] == "none"
    assert data["second_moment"][-1] is None
    np.testing.assert_array_equal(data["second_moment"][:9], profile.second_moment[:9])
    table = profile.table()
    assert len(table) == 13
    assert table[1].second_moment == profile.second_moment[1]
    assert table[12].angle is None
    assert "depth=12" in repr(profile)
    assert json.loads(predict(NormPlan(), 2).plan) == NormPlan().to_dict()
    assert isinstance(profile, Profile)
