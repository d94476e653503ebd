"""The norm against exact arithmetic: distance in units of the last place, and the rounding rule emulated by hand."""

from decimal import Decimal
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini.model.norm import RMSNorm
from tests.oracles import (
    decimal_rms_norm,
    effective_gain,
    emulated_rms_norm,
    exact_rms_norm,
    normalised,
    round_to,
    ulp_error,
)

HALVES = [torch.bfloat16, torch.float16]
BOUNDS = {  # in ULP
    (torch.float32, "early"): 6,
    (torch.float32, "late"): 6,
    (torch.bfloat16, "early"): 2,
    (torch.float16, "early"): 2,
    (torch.bfloat16, "late"): 0.51,
    (torch.float16, "late"): 0.51,
}
SHAPES = [(4,), (1, 1, 64), (2, 7, 64), (3, 5, 2048), (2, 4, 6, 16), (9, 1), (9, 3), (9, 17), (3, 8192)]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, gain: str, cast: str, *, size: float = 1.0, spread: float = 0.3
) -> tuple[RMSNorm, Tensor]:
    """A norm with effective gains of 1 ± `spread`, and an input whose elements are about `size`, both normal."""
    random = np.random.default_rng(7)
    norm = RMSNorm(shape[-1], 1e-5, gain=gain, cast=cast, dtype=dtype).requires_grad_(False)
    if norm.weight is not None:
        norm.weight.copy_(torch.from_numpy(spread * random.standard_normal(shape[-1]) + (gain == "w")))
    return norm, torch.from_numpy(size * random.standard_normal(shape)).to(dtype)


@pytest.mark.parametrize(("dtype", "cast"), BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_a_few_ulp_of_exact(shape: tuple[int, ...], dtype: torch.dtype, cast: str) -> None:
    for gain, size in product(["w", "1+w", "none"], [1e-3, 1.0, 1e3]):
        norm, x = draw(shape, dtype, gain, cast, size=size)
        exact = exact_rms_norm(x, norm.weight, norm.eps, gain)
        if (cast, gain) == ("early", "1+w") and dtype in HALVES:
            # This norm's gain is 1 + w in the input's dtype: a rounding of the gain, of which the exact norm has none.
            exact = normalised(x, norm.eps) * round_to(effective_gain(norm.weight, gain), dtype)
        assert ulp_error(norm(x), exact) <= BOUNDS[dtype, cast]


@pytest.mark.parametrize("seed", range(5))
def test_float64_against_fifty_digits(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, weight = random.standard_normal(4), random.standard_normal(4)
    exact = decimal_rms_norm(x.tolist(), weight.tolist(), 1e-5)
    norm = RMSNorm(4, 1e-5, dtype=torch.float64).requires_grad_(False)
    norm.weight.copy_(torch.from_numpy(weight))
    ours = norm(torch.from_numpy(x)).tolist()
    numpys = exact_rms_norm(torch.from_numpy(x), norm.weight, 1e-5).tolist()
    for value, our, numpy in zip(exact, ours, numpys, strict=True):
        assert abs(Decimal(our) - value) <= abs(value) * Decimal(2) ** -50  # 8 roundings of 2⁻⁵³
        assert abs(Decimal(numpy) - value) <= abs(value) * Decimal(2) ** -50


@pytest.mark.parametrize("seed", range(5))
def test_float32_against_fifty_digits(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, weight = (torch.from_numpy(random.standard_normal(3)).float() for _ in range(2))
    norm = RMSNorm(3, 1e-6).requires_grad_(False)
    norm.weight.copy_(weight)
    exact = decimal_rms_norm(x.tolist(), weight.tolist(), 1e-6)
    assert ulp_error(norm(x), np.array([float(value) for value in exact])) <= 6


def test_rounding_by_hand_is_rounding() -> None:
    random = np.random.default_rng(0)
    upper = random.integers(0, 1 << 16, 20_000, dtype=np.uint32) << np.uint32(16)
    lower = random.choice(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32), 20_000)  # ties and beside
    floats = (upper | lower).view(np.float32)
    floats = floats[np.isfinite(floats) & (np.abs(floats) > 1e-37) & (np.abs(floats) < 3e38)]
    expected = torch.from_numpy(floats).to(torch.bfloat16).double().numpy()
    assert len(floats) > 19_000
    assert np.array_equal(round_to(floats.astype(np.float64), torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rounding_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for cast, gain in product(["early", "late"], ["w", "1+w"]):
        norm, x = draw(shape, dtype, gain, cast)
        by_hand, certain = emulated_rms_norm(x, norm.weight, norm.eps, gain, cast)
        assert np.array_equal(norm(x).double().numpy()[certain], by_hand[certain])
        assert certain.mean() > 0.98


@pytest.mark.parametrize("cast", ["early", "late"])
def test_the_rounding_rule_with_a_wider_gain(cast: str) -> None:
    norm, x = draw((64, 512), torch.bfloat16, "w", cast)
    norm.to(torch.float32).weight.mul_(1.0009765625)  # bfloat16 does not hold these
    by_hand, certain = emulated_rms_norm(x, norm.weight, norm.eps, "w", cast)
    assert np.array_equal(norm(x).double().numpy()[certain], by_hand[certain])


def share_that_differs(dtype: torch.dtype, gain: str, spread: float = 0.3) -> float:
    """The share of elements to which the two orders give different bits."""
    (early, x), (late, _) = (draw((256, 2048), dtype, gain, cast, spread=spread) for cast in ("early", "late"))
    return (early(x) != late(x)).double().mean().item()


@pytest.mark.parametrize("dtype", HALVES)
def test_early_and_late_differ_in_a_quarter_of_the_elements(dtype: torch.dtype) -> None:
    assert share_that_differs(dtype, "w") == pytest.approx(0.259, abs=0.01)


@pytest.mark.parametrize("dtype", HALVES)
def test_early_and_late_differ_in_a_third_with_one_plus_w(dtype: torch.dtype) -> None:
    assert share_that_differs(dtype, "1+w") == pytest.approx(0.35, abs=0.02)  # the share depends on the gains' spread


def test_early_and_late_agree_with_unit_gains_or_in_float32() -> None:
    for gain in ("w", "1+w"):
        assert share_that_differs(torch.float32, gain) == 0
        for dtype in HALVES:
            assert share_that_differs(dtype, gain, spread=0) == 0
