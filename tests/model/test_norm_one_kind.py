"""What one kind of norm alone is: torch's LayerNorm, its authors' formula, the limit of another kind."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini.errors import ConfigError
from llama_mini.model.norm import NORMS
from tests.model.test_norm_kinds import DTYPES, EPS, UNIT, exact, make
from tests.oracles import same_bits


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_layer_is_torchs_layer_norm_without_a_bias(dtype: torch.dtype, close: float) -> None:
    norm, x = make("layer", 576, dtype, eps=1e-5)
    theirs = torch.nn.LayerNorm(576, 1e-5, bias=False, dtype=dtype)
    theirs.weight.data.copy_(norm.weight)
    torch.testing.assert_close(norm(x), theirs(x).detach(), rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_layer_with_a_bias_is_torchs_layer_norm_bit_for_bit(dtype: torch.dtype) -> None:
    norm, x = make("layer", 96, dtype, eps=1e-5, cast="late", bias=True)
    theirs = torch.nn.LayerNorm(96, 1e-5, dtype=dtype)
    theirs.load_state_dict(norm.state_dict())
    assert same_bits(norm(x), theirs(x).detach())
    plus, _ = make("layer", 96, dtype, eps=1e-5, cast="late", bias=True, gain="1+w", scale=0.5)
    theirs.weight.data, theirs.bias.data = 1 + plus.weight, plus.bias  # rounded to the weight's dtype, as in Nemotron
    assert same_bits(plus(x), theirs(x).detach() * 0.5)
    wide = torch.nn.LayerNorm(96, 1e-5).double()
    wide.load_state_dict(norm.state_dict())
    exact_y = wide(x.double()).detach().numpy()
    error = np.abs(norm(x).double().numpy() - exact_y) / np.maximum(np.abs(exact_y), 4)
    assert error.max() <= (1e-13 if dtype is torch.float64 else 8 * UNIT[torch.float32] + UNIT[dtype])


def test_without_a_gain_layer_is_torchs_layer_norm_on_float32() -> None:
    for dtype in DTYPES:
        norm, x = make("layer", 96, dtype, eps=1e-5, gain="none")
        theirs = torch.nn.functional.layer_norm(x.float(), (96,), eps=1e-5).to(dtype)  # OLMo 1
        assert same_bits(norm(x), theirs)


def test_a_bias_has_its_gradient() -> None:
    norm, x = make("layer", 5, torch.float64, eps=1e-3, cast="late", bias=True)
    leaves = (x[0, :2].clone().requires_grad_(), *norm.requires_grad_(True).parameters())

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, leaves)


def test_the_jacobian_of_layer_norm_has_two_null_directions() -> None:
    """Without eps: along the centred input, and along the constant, which RMSNorm lets pass."""
    norm, x = make("layer", 12, torch.float64, eps=0.0)
    row = x[0, 0]
    jacobian = torch.func.jacrev(norm)(row)
    assert (jacobian @ torch.ones(12, dtype=torch.float64)).abs().max() < 1e-12
    assert (jacobian @ (row - row.mean())).abs().max() < 1e-12
    assert int(torch.linalg.matrix_rank(jacobian, rtol=1e-9)) == 10
    plain, _ = make("rms", 12, torch.float64, eps=0.0)
    assert int(torch.linalg.matrix_rank(torch.func.jacrev(plain)(row), rtol=1e-9)) == 11


def test_scale_norm_is_its_authors() -> None:
    """g·√d·x/‖x‖ of Nguyen & Salazar, whose scalar is √d times this one."""
    norm, x = make("scale", 64, torch.float64, eps=0.0)
    theirs = (8 * norm.weight) * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    torch.testing.assert_close(norm(x), theirs, rtol=1e-13, atol=0)


def test_settings_of_another_kind_are_refused() -> None:
    for kind, setting, known in (
        ("rms", {"groups": 2}, "RMSNorm has no groups; kinds with it: group"),
        ("group", {"power": 0.5}, "GroupRMSNorm has no power; kinds with it: power"),
        ("l2", {"bias": True, "cast": "late"}, "L2Norm has no bias; kinds with it: layer, dyt, derf"),
        ("group", {"groups": 3}, "GroupRMSNorm: 4 elements are not a multiple of 3 groups"),
        ("group", {"groups": 0}, "GroupRMSNorm: groups must be a whole number"),
        ("power", {"power": math.nan}, "PowerNorm: power must be a finite number"),
    ):
        with pytest.raises(ConfigError, match=known):
            NORMS[kind](4, **setting)


@pytest.mark.parametrize("kind", ["dyt", "derf"])
def test_a_bias_is_added_after_the_gain_and_before_rounding(kind: str) -> None:
    for dtype, gain in product([torch.float32, torch.bfloat16], ["w", "1+w", "none"]):
        norm, x = make(kind, dtype=dtype, cast="late", bias=True, gain=gain, scale=-0.5)
        normed, factor = exact(norm, x)
        y = -0.5 * (normed * factor + norm.bias.double().numpy())
        size = np.maximum(np.abs(y), 10.0 if dtype is torch.float32 else 0.5)
        assert np.max(np.abs(norm(x).double().numpy() - y) / size) <= 8 * UNIT[torch.float32] + UNIT[dtype] * (
            dtype is not torch.float32
        )


def test_powers_lead_from_rmsnorm_to_no_norm() -> None:
    rms, x = make("rms", dtype=torch.float64)
    one, zero = (NORMS["power"](64, EPS, power=power).double() for power in (1.0, 0.0))
    one.weight = zero.weight = rms.weight
    torch.testing.assert_close(one(x), rms(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(zero(x), x * rms.weight, rtol=1e-15, atol=0)


def test_crms_is_layer_norm_without_one_element() -> None:
    """Of a row whose sum is zero, the last element says nothing that the others do not."""
    crms, x = make("crms", 63, torch.float64, gain="none")
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], dim=-1)
    layer = NORMS["layer"](64, EPS, gain="none").double()
    torch.testing.assert_close(crms(x), layer(whole)[..., :-1], rtol=1e-12, atol=1e-14)


def test_groups_are_torchs_rms_norm_of_each_part() -> None:
    norm, x = make("group", 64, torch.float64, gain="none")
    theirs = torch.nn.functional.rms_norm(x.unflatten(-1, (4, 16)), (16,), eps=EPS).flatten(-2)
    torch.testing.assert_close(norm(x), theirs, rtol=1e-13, atol=0)
