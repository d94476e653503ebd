"""Every kind of norm: against float64 NumPy, rounding by hand, torch's own LayerNorm, finite differences; on disk."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_mini.errors import ConfigError
from llama_mini.model.llama import Llama
from llama_mini.model.norm import NORMS, Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.oracles import effective_gain, round_to, same_bits
from tests.reference import normalised
from tests.tiny_models import random_tokens, tiny_model

KINDS = ["rms", "layer", "scale", "l2", "prms", "crms", "group", "power", "frozen", "dyt", "derf"]
ELEMENTWISE = ("frozen", "dyt", "derf")  # they compute no statistic
NUMBERS = {"frozen": ["inverse_rms"], "dyt": ["alpha"], "derf": ["alpha", "shift"]}
WITH_A_STATISTIC = [kind for kind in KINDS if kind not in (*ELEMENTWISE, "power")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-2  # large enough to be seen in every dtype
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half the spacing at one
ROUNDINGS = {"early": 2.02, "late": 1.02}  # of the output and, early, of what the gain multiplies
Array = NDArray[np.float64]


def own(kind: str, dim: int = 64) -> dict[str, Any]:
    """The settings that this kind alone has."""
    return {"group": {"groups": 4 if dim % 4 == 0 else dim}, "power": {"power": 0.7}}.get(kind, {})


def make(kind: str, dim: int = 64, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Norm, Tensor]:
    """A norm with random parameters, and an input whose rows have a mean and a size of their own."""
    rng = np.random.default_rng([dim, *kind.encode()])
    norm = NORMS[kind](dim, **{"eps": EPS} | own(kind, dim) | settings).to(dtype).requires_grad_(False)
    for name, parameter in norm.named_parameters():
        low = -0.5 if settings.get("gain") == "1+w" and name == "weight" else 0.5
        parameter.copy_(torch.from_numpy(rng.uniform(low, low + 1, parameter.shape)))
    rows = rng.standard_normal((6, 7, dim)) + rng.standard_normal((6, 7, 1))
    return norm, torch.from_numpy(rows * rng.uniform(0.05, 4, (6, 7, 1))).to(dtype)


def exact(norm: Norm, x: Tensor) -> tuple[Array, Array]:
    """What the gain multiplies, and the gain, both in float64."""
    numbers = {name: norm.get_parameter(name).double().numpy() for name in NUMBERS.get(norm.kind, ())}
    settings = own(norm.kind, norm.dim) | numbers
    return normalised(x.double().numpy(), norm.kind, norm.eps, **settings), effective_gain(norm.weight, norm.gain)


def magnitude(kind: str, normed: Array) -> Array:
    """What float32 rounds on the way: LayerNorm subtracts means of up to twice a row's spread, whatever is left, and
    derf adds a shift to numbers whose erf is not yet one."""
    return np.maximum(np.abs(normed), 2.0 if kind in ("layer", "derf") else 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_within_its_roundings_of_the_formula(kind: str, dtype: torch.dtype) -> None:
    for cast, gain in product(["early", "late"], ["w", "1+w", "none"]):
        norm, x = make(kind, dtype=dtype, cast=cast, gain=gain)
        normed, factor = exact(norm, x)
        if cast == "early" and dtype is not torch.float32:
            factor = round_to(factor, dtype)  # the gain is used in the input's dtype
        y = norm(x)
        assert y.dtype == dtype
        roundings = 8 if dtype is torch.float32 else ROUNDINGS[cast]
        size = magnitude(kind, normed) * np.abs(factor)
        assert np.max(np.abs(y.double().numpy() - normed * factor) / size) <= roundings * UNIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rounding(kind: str, dtype: torch.dtype) -> None:
    for cast, gain in product(["early", "late"], ["w", "1+w"]):
        norm, x = make(kind, 512, dtype, cast=cast, gain=gain)
        normed, factor = exact(norm, x)

        def rule(values: Array, cast: str = cast, factor: Array = factor) -> Array:
            if cast == "late":
                return round_to(values * factor, dtype)
            return round_to(round_to(values, dtype) * round_to(factor, dtype), dtype)

        slack = magnitude(kind, normed) * 2.0**-21  # the norm's float32 against float64
        certain = rule(normed - slack) == rule(normed + slack)
        assert certain.mean() > 0.95
        assert np.array_equal(norm(x).double().numpy()[certain], rule(normed)[certain])


@pytest.mark.parametrize("kind", KINDS)
def test_float64_and_any_width(kind: str) -> None:
    for cast, dim in product(["early", "late"], [1, 2, 3, 8, 17, 24, 40, 8192]):
        norm, x = make(kind, dim, torch.float64, cast=cast, scale=-0.7, eps=1e-5)
        normed, factor = exact(norm, x)
        np.testing.assert_allclose(norm(x).numpy(), -0.7 * normed * factor, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_and_a_fresh_norm(kind: str) -> None:
    settings = own(kind)
    fresh = NORMS[kind](48, **settings)
    shapes = {name: tuple(parameter.shape) for name, parameter in fresh.named_parameters()}
    assert shapes == {"weight": (1,) if kind == "scale" else (48,)} | dict.fromkeys(NUMBERS.get(kind, ()), (1,))
    x = make(kind, 48)[1]
    without = NORMS[kind](48, gain="none", **settings)(x)  # of layer: PyTorch's operator, as in OLMo 1
    torch.testing.assert_close(fresh(x), without, rtol=0, atol=1e-6 if kind == "layer" else 0)
    assert same_bits(fresh(x), NORMS[kind](48, gain="1+w", **settings)(x))
    assert (fresh.kind, NORMS[kind].__name__ in repr(fresh)) == (kind, True)


@pytest.mark.parametrize("gain", ["w", "1+w", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters_makes_a_fresh_norm(kind: str, gain: str) -> None:
    norm, x = make(kind, 48, torch.float64, gain=gain)
    fresh = NORMS[kind](48, EPS, gain=gain, **own(kind)).double()
    assert len(list(norm.parameters())) == 0 or not same_bits(norm(x), fresh(x))
    kept = dict(norm.named_parameters())
    norm.reset_parameters()
    assert same_bits(norm(x), fresh(x))
    for name, parameter in fresh.named_parameters():
        assert same_bits(norm.get_parameter(name), parameter)
        assert norm.get_parameter(name) is kept[name]
    starts = {"alpha": [0.5], "shift": [0.0], "inverse_rms": [1.0]}
    assert all(norm.get_parameter(name).tolist() == starts[name] for name in NUMBERS.get(kind, ()))


@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize("gain", ["w", "1+w", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float64(kind: str, gain: str, cast: str) -> None:
    norm, x = make(kind, 4, torch.float64, gain=gain, cast=cast, eps=1e-3, **({"groups": 2} if kind == "group" else {}))
    names = [name for name, _ in norm.named_parameters()]
    leaves = (x[0, :2].clone().requires_grad_(), *norm.requires_grad_(True).parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("kind", WITH_A_STATISTIC)
def test_without_eps_a_power_of_two_leaves_every_bit(kind: str) -> None:
    for cast, power in product(["early", "late"], [-20, -3, 1, 30]):
        norm, x = make(kind, cast=cast, eps=0.0)
        assert same_bits(norm(x * 2.0**power), norm(x))
        assert not same_bits(norm(x * 1.1), norm(x))
        norm.eps = EPS
        assert not same_bits(norm(x * 2.0**power), norm(x))


@pytest.mark.parametrize("kind", [kind for kind in WITH_A_STATISTIC if kind != "group"])
def test_the_radial_gradient_is_what_eps_leaves(kind: str) -> None:
    """x·∇⟨y,c⟩ = ⟨y,c⟩·ε/(s + ε), s being what eps is added to: mean x² for rms. Without eps no norm sees a size."""
    for gain, eps in product(["w", "1+w"], [0.0, 1e-6, 1e-2, 3.0]):
        norm, x = make(kind, 48, torch.float64, gain=gain, eps=eps)
        x = x[0, 0].clone().requires_grad_()
        values = x.detach().numpy()
        added_to = {
            "layer": np.var(values),
            "l2": np.sum(values**2),
            "prms": np.mean(values[:3] ** 2),
            "crms": (np.sum(values**2) + np.sum(values) ** 2) / 49,
        }.get(kind, np.mean(values**2))
        c = torch.from_numpy(np.random.default_rng(3).standard_normal(48))
        projection = norm(x) @ c
        (gradient,) = torch.autograd.grad(projection, x)
        expected = float(projection.detach()) * eps / (added_to + eps)
        assert float(x.detach() @ gradient) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind: str) -> None:
    norm, x = make(kind)
    assert kind == "derf" or same_bits(norm(torch.zeros(2, 64)), torch.zeros(2, 64))
    clean = norm(x)
    x[1, 2, 0] = math.nan  # of prms too: the first element is part of its statistic
    y = norm(x)
    assert int(y.isnan().any(-1).sum()) == 1
    assert int(y.isnan().sum()) == (1 if kind in ELEMENTWISE else 16 if kind == "group" else 64)
    assert same_bits(y[2:], clean[2:])
    big = torch.full((1, 64), 300.0, dtype=torch.float16)
    assert norm.to(torch.float16)(big).isfinite().all()


@pytest.mark.parametrize("bad", [{"eps": -1.0}, {"gain": "2w"}, {"cast": "never"}, {"scale": math.inf}, {"dim": 0}])
@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_refused_by_the_norms_name(kind: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{NORMS[kind].__name__}:? {next(iter(bad))} "):
        NORMS[kind](**{"dim": 4} | bad)


def spec(kind: str) -> NormSpec:
    return NormSpec(kind=kind, eps=0.01, gain="1+w", cast="late", scale=0.5, **own(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_specs_survive_json_and_build_their_class(kind: str) -> None:
    for made in (spec(kind), NormSpec(kind=kind)):
        assert made.to_dict().items() >= own(kind).items() or made == NormSpec(kind=kind)
        assert NormSpec.from_dict(json.loads(json.dumps(made.to_dict())), "here") == made
    norm = spec(kind).build(48, norm_eps=1.0)
    assert type(norm) is NORMS[kind]
    assert (norm.dim, norm.eps, norm.gain, norm.cast, norm.scale) == (48, 0.01, "1+w", "late", 0.5)
    assert NormSpec(kind=kind).build(48, norm_eps=0.25).eps == 0.25
    assert NormSpec.from_dict({"kind": "none"}, "here") is None


def everywhere(kind: str) -> NormPlan:
    own = spec(kind)
    full = replace(own, view="full")
    attention = BranchPlan(pre=own, q=own, k=full, v=full, mid=own, out=own, post=own)
    return NormPlan(
        attention=attention, feed_forward=BranchPlan(pre=own, mid=own, out=own, post=own), embed=own, final=own
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_slot_takes_every_kind_and_the_disk_keeps_it(kind: str, tmp_path: Path) -> None:
    plan, tokens = everywhere(kind), random_tokens(2, 11)
    assert NormPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    model = tiny_model(3, norm_plan=plan)
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    assert [type(norm) for norm in norms] == [NORMS[kind]] * (2 + 3 * 11)
    model.save_pretrained(tmp_path / "saved")
    again = Llama.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    assert same_bits(again(tokens), model(tokens))
