"""Every native operator, in every form that the processor has, against float64 from the formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_mini.optimize.build import FORMS
from llama_mini.optimize.matrix import Matrix
from tests.optimize import twins
from tests.optimize.twins import FORMATS, dense, each_form, generator, norm_of, random, random_matrix, same_bits

CODED = [name for name in FORMATS if name != "float"]
DTYPES = [torch.float32, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32)
batches = st.integers(1, 17)
few = settings(max_examples=30, deadline=None, derandomize=True)
op = torch.ops.llama_mini


form = pytest.fixture(scope="module", params=FORMS)(each_form)


def project(x: Tensor, matrix: Matrix) -> Tensor:
    return op.project(x, matrix.tensors, matrix.bias_or_nothing, matrix.width)


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# --- a matrix times a few rows ---


@pytest.mark.parametrize("format_", FORMATS)
@given(
    seed=seeds, dtype=dtypes, batch=batches, rows=st.integers(1, 70), columns=st.integers(1, 170), bias=st.booleans()
)
@few
def test_project(
    form: str, format_: str, seed: int, dtype: torch.dtype, batch: int, rows: int, columns: int, bias: bool
) -> None:
    rng = generator(seed)
    matrix = random_matrix(format_, [rows, 3], columns, dtype, rng, bias)
    x = random((batch, columns), dtype, rng)
    before = x.clone()
    y = project(x, matrix)
    weight = dense(matrix)[: matrix.width].abs()
    bound = 1e-6 * (x.double().abs() @ weight.T + 1)
    if format_ != "float":  # activations are rounded to 16 bits
        bound += x.double().abs().amax(-1, keepdim=True) / 65024 * weight.sum(-1)
    assert y.dtype == torch.float32
    assert ((y - twins.product(x, matrix)).abs() <= bound).all()
    assert same_bits(x, before)
    assert all(same_bits(y[b : b + 1], project(x[b : b + 1], matrix)) for b in range(batch))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_project_of_tiny_and_huge_rows(form: str, format_: str, scale: float) -> None:
    rng = generator(7)
    matrix = random_matrix(format_, [37], 99, torch.float32, rng)
    x = random((3, 99), torch.float32, rng, scale)
    expected = twins.product(x, matrix)
    assert ((project(x, matrix) - expected).abs() <= 3e-4 * expected.abs().amax()).all()
    assert project(torch.zeros(2, 99), matrix).eq(0).all()


@pytest.mark.parametrize("format_", CODED)
@given(seed=seeds, dtype=dtypes, batch=batches, rows=st.integers(1, 70), columns=st.integers(1, 170))
@few
def test_integer_sums_have_the_same_bits_in_every_form(
    form: str, format_: str, seed: int, dtype: torch.dtype, batch: int, rows: int, columns: int
) -> None:
    rng = generator(seed)
    matrix, x = random_matrix(format_, [rows], columns, dtype, rng), random((batch, columns), dtype, rng)
    y = project(x, matrix)
    op.use_form("avx2")
    assert same_bits(project(x, matrix), y)
    op.use_form(form)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 31, 44])
def test_what_is_not_finite_stays_in_its_row_and_shows(
    form: str, format_: str, dtype: torch.dtype, bad: float, at: int
) -> None:
    rng = generator(11)
    matrix, x = random_matrix(format_, [35], 45, dtype, rng), random((6, 45), dtype, rng)
    clean = project(x, matrix)
    x[2, at] = bad
    y = project(x, matrix)
    assert y[2].isnan().all() if format_ != "float" else not y[2].isfinite().any()
    others = torch.arange(6) != 2
    assert same_bits(y[others], clean[others])


@pytest.mark.parametrize("format_", CODED)
@given(seed=seeds, dtype=dtypes, parts=st.lists(st.integers(1, 40), min_size=1, max_size=3), columns=st.integers(1, 99))
@few
def test_widen(form: str, format_: str, seed: int, dtype: torch.dtype, parts: list[int], columns: int) -> None:
    rng = generator(seed)
    matrix = random_matrix(format_, parts, columns, dtype, rng)
    first = 16 * int(torch.randint(matrix.rows // 16, (), generator=rng))
    last = int(torch.randint(first, matrix.rows + 1, (), generator=rng))
    out = torch.full((last - first + 1, columns), 7, dtype=dtype)  # one row more, which is not to be written
    op.widen(matrix.tensors, first, out[:-1], matrix.rows)
    expected = dense(matrix)[first:last]
    assert ((out[:-1] - expected).abs() <= rounding(dtype) * expected.abs() + 1e-6 * dense(matrix).abs().max()).all()
    assert out[-1].eq(7).all()


# --- norm and SwiGLU ---


@given(seed=seeds, dtype=dtypes, n=batches, width=st.integers(1, 200), late=st.booleans())
@few
def test_rms_norm(form: str, seed: int, dtype: torch.dtype, n: int, width: int, late: bool) -> None:
    rng = generator(seed)
    x, norm = random((n, 2, width), dtype, rng), norm_of(width, dtype, rng, late)
    y, expected = op.rms_norm(x, *norm), twins.rms_norm(x, norm, dtype)
    assert ((y - expected).abs() <= 2.1 * rounding(dtype) * expected.abs()).all()
    assert all(same_bits(y[i : i + 1], op.rms_norm(x[i : i + 1], *norm)) for i in range(n))


@pytest.mark.parametrize("late", [False, True])
def test_rms_norm_rounds_where_it_says(form: str, late: bool) -> None:
    rng = generator(3)
    x, norm = random((40, 77), torch.bfloat16, rng), norm_of(77, torch.bfloat16, rng, late)
    y = op.rms_norm(x, *norm)
    assert (y != twins.rms_norm(x, norm, x.dtype)).double().mean() < 0.002  # ties, in float32
    assert (y != twins.rms_norm(x, norm._replace(late=not late), x.dtype)).double().mean() > 0.1


def test_rms_norm_takes_rows_apart_and_uncommon_rows(form: str) -> None:
    rng = generator(5)
    norm = norm_of(33, torch.float32, rng, False)
    x = random((66, 5), torch.float32, rng).T[:, ::2]
    assert same_bits(op.rms_norm(x, *norm), op.rms_norm(x.contiguous(), *norm))
    assert op.rms_norm(torch.zeros(2, 33), *norm).eq(0).all()
    odd = x.clone()
    odd[1, 4], odd[3, 4] = torch.nan, torch.inf
    y = op.rms_norm(odd, *norm)
    assert y[1].isnan().all()
    assert y[3, 4].isnan()
    assert same_bits(y[[0, 2, 4]], op.rms_norm(x, *norm)[[0, 2, 4]])


@given(seed=seeds, dtype=dtypes, n=batches, hidden=st.integers(1, 90), gap=st.integers(0, 20))
@few
def test_swiglu(form: str, seed: int, dtype: torch.dtype, n: int, hidden: int, gap: int) -> None:
    x = random((n, 2 * hidden + 2 * gap), dtype, generator(seed), 3)
    gate, up = x[:, :hidden], x[:, hidden + gap :][:, :hidden]
    y, expected = op.swiglu(x, hidden, hidden + gap), twins.silu(gate) * up
    assert y.dtype == dtype
    assert ((y - expected).abs() <= (0.51 if dtype == torch.bfloat16 else 4) * rounding(dtype) * expected.abs()).all()


def test_silu_is_within_three_ulp_and_never_astray(form: str) -> None:
    gate = torch.cat((torch.linspace(-87, 88, 200_001), torch.linspace(-1e-3, 1e-3, 2001)))
    y = op.swiglu(torch.stack((gate, torch.ones_like(gate)), -1), 1, 1)[:, 0]
    expected = twins.silu(gate)
    ulp = torch.nextafter(expected.float().abs(), torch.tensor(torch.inf)).double() - expected.float().abs()
    assert ((y - expected).abs() / ulp).max() < 2.6
    far = torch.tensor([[-1e30, 1], [-100, 1], [1e30, 1], [torch.nan, 1], [1, torch.nan]])
    y = op.swiglu(far, 1, 1)[:, 0]
    assert y[:2].abs().max() < 1e-7  # e^-x ends at e^88.3, not at infinity
    assert y[2] == far[2, 0]
    assert y[3:].isnan().all()
