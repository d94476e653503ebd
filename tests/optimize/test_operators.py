"""The operators of one matrix, in every ISA variant that the processor has, against float64 from the formulas."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_mini.checkpoint.code_formats import code_format
from llama_mini.optimize.build import ISA_VARIANTS
from llama_mini.optimize.fusable import NormArgs
from llama_mini.optimize.packed_linear import PackedLinear
from llama_mini.optimize.quantized_linear import QuantizedLinear
from tests.optimize import twins
from tests.optimize.layer_twins import rms_norm
from tests.optimize.twins import (
    CODED,
    FORMATS,
    dense,
    each_isa,
    examples,
    generator,
    multiplied,
    product_of_few,
    product_of_many,
    random,
    random_codes,
    random_gain,
    random_matrix,
    same_bits,
    some,
)

DTYPES = [torch.float32, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32)
batches = st.integers(1, 17)
op = torch.ops.llama_mini


isa = pytest.fixture(scope="module", params=ISA_VARIANTS)(each_isa)


def gemv(x: Tensor, matrix: PackedLinear) -> Tensor:
    return op.gemv(x, matrix.tensors, matrix.bias_or_empty, matrix.width)


def gemm(x: Tensor, matrix: PackedLinear) -> Tensor:
    return op.gemm(x, matrix.tensors, matrix.bias_or_empty, matrix.width)


def uneven(n: int, columns: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Rows with outliers, as the residual stream has."""
    return (random((n, columns), torch.float64, rng) * random((n, columns), torch.float64, rng).exp()).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# --- a few rows ---


@pytest.mark.parametrize("format_", FORMATS)
@given(
    seed=seeds, dtype=dtypes, batch=batches, rows=st.integers(1, 70), columns=st.integers(1, 600), bias=st.booleans()
)
@examples(10)
def test_gemv(
    isa: str, format_: str, seed: int, dtype: torch.dtype, batch: int, rows: int, columns: int, bias: bool
) -> None:
    rng = generator(seed)
    matrix = random_matrix(format_, [rows, 3], columns, dtype, rng, bias)
    x = uneven(batch, columns, dtype, rng)
    before = x.clone()
    y = gemv(x, matrix)
    bound = 1e-6 * (x.double().abs() @ dense(matrix)[: matrix.width].abs().T + 1)
    assert y.dtype == torch.float32
    assert ((y - product_of_few(x, matrix, isa, dtype)).abs() <= bound).all()
    assert same_bits(x, before)
    assert all(same_bits(y[b : b + 1], gemv(x[b : b + 1], matrix)) for b in some(batch, rng))


@pytest.mark.parametrize("format_", CODED)
@given(seed=seeds, dtype=dtypes, batch=batches, rows=st.integers(1, 70), columns=st.integers(1, 170))
@examples(10)
def test_integer_sums_have_the_same_bits_in_every_isa(
    isa: str, format_: str, seed: int, dtype: torch.dtype, batch: int, rows: int, columns: int
) -> None:
    rng = generator(seed)
    matrix, x = random_matrix(format_, [rows], columns, dtype, rng), random((batch, columns), dtype, rng)
    y = gemv(x, matrix)
    like = "neon" if isa.startswith("neon") else "avx2" if dtype == torch.float32 or isa == "avx2" else "avx512"
    op.use_isa(like)  # that rounds activations so, too
    assert same_bits(gemv(x, matrix), y)
    op.use_isa(isa)


@pytest.mark.parametrize("late", [False, True])
@given(seed=seeds, dtype=dtypes, count=st.integers(0, 40), width=st.integers(1, 170), eps=st.sampled_from([0, 1e-5, 1]))
@examples(30)
def test_rms_norm(isa: str, late: bool, seed: int, dtype: torch.dtype, count: int, width: int, eps: float) -> None:
    rng = generator(seed)
    x = random((count, width), dtype, rng) * 10.0 ** int(torch.randint(-9, 9, (), generator=rng))
    norm = NormArgs(random_gain(width, dtype, rng), eps, int(late))
    y = op.rms_norm(x, *norm)
    # Roundings of 2^-24. Those under the root count half: width / 8 + 1 in the sum of a lane, 3 to add 8 lanes,
    # 3 by mean, eps and eps in float32. Root, reciprocal and two products add 4, and the twin's own results 2.
    # In bfloat16 both round twice, by 2^-8. (AVX-512 needs fewer: 16 lanes.)
    roundings = 10 + width / 16 if dtype == torch.float32 else 4
    rtol = roundings * rounding(dtype) / 2
    torch.testing.assert_close(y, rms_norm(x, norm, dtype), rtol=rtol, atol=1e-30)
    assert all(same_bits(y[i], op.rms_norm(x[i], *norm)) for i in some(count, rng))


# --- many tokens ---


@pytest.mark.parametrize("format_", FORMATS)
@given(
    seed=seeds,
    dtype=dtypes,
    n=st.integers(1, 70),
    parts=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    columns=st.integers(1, 300),
    bias=st.booleans(),
)
@examples(10)
def test_gemm(
    isa: str, format_: str, seed: int, dtype: torch.dtype, n: int, parts: list[int], columns: int, bias: bool
) -> None:
    """Differs by float32 sums, and by one rounding of the result."""
    rng = generator(seed)
    matrix, x = random_matrix(format_, parts, columns, dtype, rng, bias), uneven(n, columns, dtype, rng)
    before, y = x.clone(), gemm(x, matrix)
    tokens, weight = multiplied(x, matrix, isa)
    expected = product_of_many(x, matrix, isa)
    bound = 2e-6 * (tokens.abs() @ weight.abs().T + 1)
    bound += rounding(dtype) * expected.abs() * 0.51
    assert y.dtype == dtype
    assert ((y - expected).abs() <= bound).all()
    assert same_bits(x, before)
    for token in some(n, rng):
        assert same_bits(gemm(x[token : token + 1], matrix), y[token : token + 1])


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_of_more_tokens_than_are_taken_together(isa: str, format_: str, dtype: torch.dtype) -> None:
    rng = generator(2)
    matrix, x = random_matrix(format_, [37], 70, dtype, rng, bias=True), uneven(1000, 70, dtype, rng)
    expected, y = product_of_many(x, matrix, isa), gemm(x, matrix)
    assert ((y - expected).abs() <= 3e-6 * x.norm(dim=-1, keepdim=True) + rounding(dtype) * expected.abs() * 0.51).all()
    assert same_bits(torch.cat([gemm(part, matrix) for part in x.split([333, 500, 167])]), y)


def test_a_group_with_an_outlier_has_sixteen_bits(isa: str) -> None:
    rng = generator(1)
    matrix, x = random_matrix("int8", [64], 256, torch.bfloat16, rng), random((40, 256), torch.bfloat16, rng)
    x[:, 96:128] *= 64
    expected = x.double() @ multiplied(x, matrix, isa)[1].T
    # bfloat16 rounds the result by as much; eight bits would add 5e-3
    assert (gemm(x, matrix).double() - expected).norm() / expected.norm() < 2.5e-3


# --- either ---


@pytest.mark.parametrize("format_", CODED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_codes_and_activations_do_not_overflow(isa: str, format_: str, dtype: torch.dtype) -> None:
    for first, value in product((1.0, 1e3), (1.0, -1.0)):  # 1e3: an outlier, whose group has sixteen bits
        codes = random_codes(format_, 35, 96, generator(3))
        codes.codes.fill_(2 ** code_format(format_).bits - 1)
        matrix = QuantizedLinear(format_, [35], 96, dtype, True)
        matrix.load_codes(0, codes)
        x = torch.full((7, 96), value, dtype=dtype)
        x[:, :32] *= first
        bound = 1e-5 * (x.double().abs() @ dense(matrix)[:35].abs().T).amax()
        assert ((gemv(x, matrix) - product_of_few(x, matrix, isa, dtype)).abs() <= bound).all(), (first, value)
        expected = product_of_many(x, matrix, isa)
        assert ((gemm(x, matrix) - expected).abs() <= bound + rounding(dtype) * expected.abs()).all(), (first, value)


@pytest.mark.parametrize("format_", FORMATS)
def test_tiny_and_huge_rows(isa: str, format_: str) -> None:
    for scale in (1e-25, 1e25):
        rng = generator(7)
        matrix, x = random_matrix(format_, [37], 99, torch.float32, rng), random((23, 99), torch.float32, rng, scale)
        expected = twins.product(x, matrix)
        most = 2e-6 if format_ == "float" else 3e-4
        for times in (gemv, gemm):
            assert ((times(x, matrix) - expected).abs() <= most * expected.abs().amax()).all(), (scale, times)
            assert times(torch.zeros(20, 99), matrix).eq(0).all(), times


@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_not_finite_stays_in_its_row_and_shows(isa: str, format_: str) -> None:
    for times, dtype in product((gemv, gemm), DTYPES):
        rng = generator(11)
        matrix, x = random_matrix(format_, [35], 45, dtype, rng), random((17, 45), dtype, rng)
        clean, others = times(x, matrix), torch.arange(17) != 3
        widened = times is gemm and isa == "amx" and dtype == torch.bfloat16
        for bad, at in product((torch.nan, torch.inf, -torch.inf), (0, 31, 44)):
            spoiled = x.clone()
            spoiled[3, at] = bad
            y, which = times(spoiled, matrix), (times, dtype, bad, at)
            assert not y[3].isfinite().any() if format_ == "float" or widened else y[3].isnan().all(), which
            assert same_bits(y[others], clean[others]), which


# --- rows as floats ---


@pytest.mark.parametrize("format_", CODED)
@given(seed=seeds, dtype=dtypes, parts=st.lists(st.integers(1, 40), min_size=1, max_size=3), columns=st.integers(1, 99))
@examples(10)
def test_dequantize_rows(isa: str, format_: str, seed: int, dtype: torch.dtype, parts: list[int], columns: int) -> None:
    """Dequantized in float32, whose rounding is at most that of the largest number that is added."""
    rng = generator(seed)
    matrix = random_matrix(format_, parts, columns, dtype, rng)
    at = torch.randint(matrix.rows, (int(torch.randint(20, (), generator=rng)),), generator=rng)
    y, expected = op.dequantize_rows(matrix.tensors, at, columns, dtype), dense(matrix)[at]
    assert y.shape == expected.shape
    assert y.dtype == dtype
    bound = rounding(dtype) / 2 * expected.abs() + 1e-6 * dense(matrix).abs().max()
    assert ((y - expected).abs() <= bound).all()
