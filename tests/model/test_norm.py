"""What the norm does with shapes, strides, dtypes, extremes, gradients and refusals. Accuracy: test_norm_exact.py."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_mini.errors import ConfigError
from llama_mini.model.norm import RMSNorm
from tests.oracles import effective_gain, exact_rms_norm, normalised, same_bits, ulp_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(4,), (1, 1, 64), (2, 7, 64), (3, 5, 2048), (2, 4, 6, 16), (5, 1), (5, 3), (5, 17), (2, 8192)]


def make_norm(dim: int, eps: float = 1e-6, *, dtype: torch.dtype = torch.float32, **options: str) -> RMSNorm:
    """A norm whose effective gains are random in 0.5 to 1.5."""
    norm = RMSNorm(dim, eps, dtype=dtype, **options)
    if norm.weight is not None:
        values = np.random.default_rng(dim).random(dim) + (-0.5 if norm.gain == "1+w" else 0.5)
        norm.weight.data.copy_(torch.from_numpy(values))
    return norm.requires_grad_(False)


def make_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_is_normed_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm, x = make_norm(shape[-1], dtype=dtype), make_input(*shape, dtype=dtype)
    y = norm(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    rows = torch.stack([norm(row) for row in x.reshape(-1, shape[-1])])
    assert same_bits(y, rows.view(shape))


@pytest.mark.parametrize("shape", [(0, 7, 64), (2, 0, 64), (0, 64)])
def test_an_empty_batch_or_length_stays_empty(shape: tuple[int, ...]) -> None:
    assert make_norm(64)(make_input(*shape)).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_outside_the_row_do_not_matter(dtype: torch.dtype) -> None:
    norm = make_norm(16, dtype=dtype)
    views = {
        "heads before positions": make_input(2, 6, 4, 16, dtype=dtype).transpose(1, 2),
        "a slice of wider rows": make_input(2, 6, 48, dtype=dtype)[..., 16:32],
        "every second row": make_input(12, 16, dtype=dtype)[::2],
        "expanded": make_input(1, 1, 16, dtype=dtype).expand(3, 5, 16),
    }
    for name, view in views.items():
        assert same_bits(norm(view), norm(view.clone(memory_format=torch.contiguous_format))), name


@pytest.mark.parametrize("view", [make_input(2048, 5).T, make_input(5, 4096)[:, ::2], make_input(5, 1).expand(5, 2048)])
def test_strides_inside_the_row_change_the_order_of_summation_only(view: Tensor) -> None:
    norm = make_norm(2048)
    assert view.stride(-1) != 1
    assert ulp_error(norm(view), exact_rms_norm(view, norm.weight, norm.eps)) <= 6


@pytest.mark.parametrize("gain", ["w", "1+w", "none"])
@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_input_is_left_alone(dtype: torch.dtype, cast: str, gain: str) -> None:
    x = make_input(3, 16, dtype=dtype)
    before = x.clone()
    y = make_norm(16, gain=gain, cast=cast)(x)
    assert same_bits(x, before)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    for weight_dtype, gain, cast in product(
        [torch.float32, torch.bfloat16, torch.float64], ["w", "1+w", "none"], ["early", "late"]
    ):
        assert make_norm(16, dtype=weight_dtype, gain=gain, cast=cast)(make_input(3, 16, dtype=dtype)).dtype == dtype


def test_an_early_norm_uses_its_gain_in_the_inputs_dtype() -> None:
    norm, x = make_norm(64), make_input(7, 64, dtype=torch.bfloat16)
    rounded = make_norm(64).to(torch.bfloat16)
    assert not torch.equal(norm.weight, rounded.weight.float())
    assert same_bits(norm(x), rounded(x))


@pytest.mark.parametrize("gain", ["w", "1+w", "none"])
@pytest.mark.parametrize("cast", ["early", "late"])
def test_float64_is_computed_in_float64(gain: str, cast: str) -> None:
    norm = make_norm(576, 1e-5, dtype=torch.float64, gain=gain, cast=cast)
    x = make_input(5, 576, dtype=torch.float64)
    np.testing.assert_allclose(norm(x).numpy(), exact_rms_norm(x, norm.weight, 1e-5, gain), rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_give_zeros(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 16, dtype=dtype)
    assert same_bits(make_norm(16, dtype=dtype)(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_takes_its_row_and_no_other(dtype: torch.dtype) -> None:
    norm, x = make_norm(16, dtype=dtype), make_input(3, 16, dtype=dtype)
    clean = norm(x)
    x[1, 5] = math.nan
    y = norm(x)
    assert y[1].isnan().all()
    assert same_bits(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_nan_there_and_zeroes_its_row(dtype: torch.dtype, sign: int) -> None:
    norm, x = make_norm(16, dtype=dtype), make_input(3, 16, dtype=dtype)
    clean = norm(x)
    x[1, 5] = sign * math.inf
    y = norm(x)
    assert y[1].isnan().nonzero().tolist() == [[5]]
    assert (y[1].nan_to_num() == 0).all()
    assert same_bits(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("dtype", "below", "above"),  # ‖x‖₂; the limit is 2⁶⁴ = 1.8447e19, and bfloat16 has no number closer to it
    [(torch.float32, 1.8446e19, 1.8448e19), (torch.bfloat16, 2.0**64 - 2.0**56, 2.0**64)],
)
def test_a_sum_of_squares_beyond_float32_silently_gives_zero(dtype: torch.dtype, below: float, above: float) -> None:
    norm = RMSNorm(4, dtype=dtype).requires_grad_(False)
    row = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=dtype)  # of length 1
    np.testing.assert_allclose(norm(row * below).float().numpy(), 2 * row.float().numpy(), rtol=1e-6)
    assert (norm(row * above) == 0).all()


def test_squares_do_not_overflow_float16() -> None:
    x = torch.full((64,), 300, dtype=torch.float16)
    assert x.pow(2).isinf().all()
    assert (RMSNorm(64, dtype=torch.float16)(x) == 1).all()


def test_tiny_inputs_are_dominated_by_eps() -> None:
    x = torch.full((64,), 1e-40)
    np.testing.assert_allclose(RMSNorm(64, 1e-6)(x).detach().numpy(), 1e-37, rtol=1e-4)  # 1e-40 / √1e-6


@pytest.mark.parametrize(("eps", "published"), [(1e-6, 0.7071), (1e-5, 0.3015)])
def test_eps_is_inside_the_root(eps: float, published: float) -> None:
    x = make_input(4096)
    x *= 1e-3 / x.pow(2).mean().sqrt()
    rms = RMSNorm(4096, eps)(x).pow(2).mean().sqrt().item()
    assert rms == pytest.approx(published, abs=5e-5)
    assert rms == pytest.approx(1e-3 / math.sqrt(1e-6 + eps), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_eps_a_power_of_two_leaves_every_bit(dtype: torch.dtype) -> None:
    for cast, power in product(["early", "late"], [-12, -3, 1, 7, 12]):
        # Whole numbers of at most 3 bits: float16 holds them at every one of these scales.
        x = torch.from_numpy(np.random.default_rng(2).integers(-7, 8, (5, 64))).to(dtype)
        norm = make_norm(64, 0.0, dtype=dtype, cast=cast)
        assert same_bits(norm(x * 2.0**power), norm(x))
        assert not same_bits(norm(x * 1.1), norm(x))


def test_scale_multiplies_the_output() -> None:
    norm, x = make_norm(64), make_input(7, 64)
    expected = norm(x)
    norm.scale = 0.25
    assert same_bits(norm(x), expected * 0.25)


@pytest.mark.parametrize("cast", ["early", "late"])
@pytest.mark.parametrize("gain", ["w", "1+w", "none"])
def test_gradients_in_float64(gain: str, cast: str) -> None:
    norm = make_norm(5, 1e-5, dtype=torch.float64, gain=gain, cast=cast).requires_grad_(True)
    leaves = (make_input(3, 5, dtype=torch.float64).requires_grad_(), *norm.parameters())

    def call(x: Tensor, *weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, dict(zip(["weight"], weight, strict=False)), (x,))

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("gain", ["w", "1+w", "none"])
def test_the_jacobian_is_the_closed_form(gain: str, eps: float) -> None:
    norm, x = make_norm(6, eps, dtype=torch.float64, gain=gain), make_input(6, dtype=torch.float64)
    root = math.sqrt(np.mean(x.numpy() ** 2) + eps)
    unit = normalised(x, eps)
    expected = (np.eye(6) - np.outer(unit, unit) / 6) / root * effective_gain(norm.weight, gain).reshape(-1, 1)
    np.testing.assert_allclose(torch.func.jacrev(norm)(x).numpy(), expected, rtol=1e-12, atol=1e-14)


def test_a_fresh_norm_has_an_effective_gain_of_one() -> None:
    x = make_input(7, 64)
    plain = RMSNorm(64, gain="none")
    assert not list(plain.parameters())
    assert same_bits(RMSNorm(64, gain="w")(x), plain(x))
    assert same_bits(RMSNorm(64, gain="1+w")(x), plain(x))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"dim": 0}, "dim .* 0"),
        ({"dim": -4}, "dim .* -4"),
        ({"dim": 4.0}, "dim .* 4.0"),
        ({"dim": True}, "dim .* True"),
        ({"eps": -1e-6}, "eps .* -1e-06"),
        ({"eps": math.nan}, "eps .* nan"),
        ({"eps": math.inf}, "eps .* inf"),
        ({"gain": "2+w"}, r"gain '2\+w'; known: w, 1\+w, none"),
        ({"cast": "never"}, "cast 'never'; known: early, late"),
        ({"scale": math.nan}, "scale .* nan"),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, object], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        RMSNorm(**{"dim": 4, **settings})


def test_inputs_that_cannot_be_normed_are_refused() -> None:
    norm = RMSNorm(4)
    with pytest.raises(ValueError, match=r"over 4 elements .* \(2, 5\)"):
        norm(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"over 4 elements .* \(2, 1\)"):  # it would broadcast
        norm(torch.ones(2, 1))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype)):
            norm(torch.ones(2, 4, dtype=dtype))
