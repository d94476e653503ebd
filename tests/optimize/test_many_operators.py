"""Many tokens times matrices of codes, alone and through whole layers, in every form, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_mini.optimize.build import FORMS
from llama_mini.optimize.matrix import Matrix
from tests.optimize import twins
from tests.optimize.test_attention_operators import assert_near, random_step
from tests.optimize.twins import Step, dense, each_form, generator, layer_step, random, random_matrix, same_bits

CODED = ["int8", "int4"]
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**32)
few = settings(max_examples=25, deadline=None, derandomize=True)
op = torch.ops.llama_mini

form = pytest.fixture(scope="module", params=FORMS)(each_form)


def product(x: Tensor, matrix: Matrix) -> Tensor:
    return op.product(x, matrix.tensors, matrix.bias_or_nothing, matrix.width)


def as_codes(x: Tensor, form: str) -> Tensor:
    """x (n, columns) as the operators multiply it, float64: eight bits for 32 columns, sixteen where they are loud."""
    n, columns = x.shape
    steps = torch.nn.functional.pad(x.float(), (0, -columns % 32)).view(n, -1, 32)
    peak = steps.abs().amax(-1, keepdim=True)
    loud = peak.square() > 3 * peak.square().mean(1, keepdim=True)
    if x.dtype == torch.float32 or form == "avx2":
        loud = torch.ones_like(loud)
    levels = torch.where(loud, 32512.0, 127.0)
    codes = torch.where(peak == 0, 0, steps.double() * (levels / peak).double()).round()
    return (codes * peak.double() / levels.double()).flatten(1)[:, :columns]


def uneven(n: int, columns: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Rows that are loud somewhere, as the residual stream is."""
    return (random((n, columns), torch.float64, rng) * random((n, columns), torch.float64, rng).exp()).to(dtype)


@pytest.mark.parametrize("format_", CODED)
@given(
    seed=seeds,
    dtype=dtypes,
    n=st.integers(1, 40),
    parts=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    columns=st.integers(1, 300),
    bias=st.booleans(),
)
@few
def test_product(
    form: str, format_: str, seed: int, dtype: torch.dtype, n: int, parts: list[int], columns: int, bias: bool
) -> None:
    rng = generator(seed)
    matrix, x = random_matrix(format_, parts, columns, dtype, rng, bias), uneven(n, columns, dtype, rng)
    before, y = x.clone(), product(x, matrix)
    expected = twins.product(as_codes(x, form), matrix)
    bound = 2e-6 * (x.double().abs() @ dense(matrix)[: matrix.width].abs().T + 1)
    bound += torch.finfo(dtype).eps * expected.abs() * 0.51
    assert y.dtype == dtype
    assert ((y - expected).abs() <= bound).all()
    assert same_bits(x, before)
    for token in range(n):
        assert same_bits(product(x[token : token + 1], matrix), y[token : token + 1])


@pytest.mark.parametrize("format_", CODED)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_product_of_tiny_and_huge_tokens(form: str, format_: str, scale: float) -> None:
    rng = generator(7)
    matrix, x = random_matrix(format_, [37], 99, torch.float32, rng), random((23, 99), torch.float32, rng, scale)
    expected = twins.product(x, matrix)
    assert ((product(x, matrix) - expected).abs() <= 3e-4 * expected.abs().amax()).all()
    assert product(torch.zeros(20, 99), matrix).eq(0).all()


@pytest.mark.parametrize("format_", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 31, 44])
def test_what_is_not_finite_stays_in_its_token_and_shows(
    form: str, format_: str, dtype: torch.dtype, bad: float, at: int
) -> None:
    rng = generator(11)
    matrix, x = random_matrix(format_, [35], 45, dtype, rng), random((17, 45), dtype, rng)
    clean = product(x, matrix)
    x[3, at] = bad
    y = product(x, matrix)
    assert y[3].isnan().all()
    others = torch.arange(17) != 3
    assert same_bits(y[others], clean[others])


def test_a_loud_step_is_kept_to_sixteen_bits(form: str) -> None:
    rng = generator(1)
    matrix, x = random_matrix("int8", [64], 256, torch.bfloat16, rng), random((40, 256), torch.bfloat16, rng)
    x[:, 96:128] *= 64
    with_loud = (product(x, matrix).double() - twins.product(x, matrix)).norm() / twins.product(x, matrix).norm()
    assert with_loud < 2.5e-3  # bfloat16 rounds the result by as much; eight bits would add 5e-3


# --- prompts through layers ---


def prompt(step: Step, start: int, end: int) -> Step:
    """Rows of a batch as tokens of one row, which has the first row's cache."""
    at = slice(start, end)
    return step._replace(x=step.x[at], cos=step.cos[at], sin=step.sin[at], positions=step.positions[at])


def run(step: Step) -> Tensor:
    """The tokens of one row, all at once."""
    positions = step.positions.view(1, -1)
    y = step._replace(x=step.x[None], cos=step.cos[None], sin=step.sin[None], positions=positions).run_as_it_is()
    return y[0]


def token_by_token(step: Step, form: str) -> Tensor:
    x = step.x
    for layer in step.layers:
        each = zip(x, step.cos, step.sin, step.positions, strict=True)
        x = torch.cat([layer_step(*(t[None] for t in token), layer, step.heads, form) for token in each])
    return x


def random_prompt(seed: int, format_: str, dtype: torch.dtype, old: int, new: int, *shape: int, late: int = 0) -> Step:
    step = random_step(seed, format_, dtype, new, *shape, longest=old + new, bias=True, late=late)
    for layer in step.layers:
        for cache in (layer.k, layer.v):
            cache[0] = random(cache[0].shape, dtype, generator(seed))
            cache[0, :, old:] = torch.nan
    layers = [layer._replace(k=layer.k[:1], v=layer.v[:1]) for layer in step.layers]
    return step._replace(positions=torch.arange(old, old + new)[:, None], layers=layers)


@pytest.mark.parametrize("format_", CODED)
@given(
    seed=seeds,
    dtype=dtypes,
    old=st.integers(0, 30),
    new=st.integers(2, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 40),
    dim=st.integers(1, 100),
    hidden=st.integers(1, 100),
    late=st.integers(0, 15),
)
@settings(few, max_examples=12)
def test_a_prompt_through_layers(
    form: str,
    format_: str,
    seed: int,
    dtype: torch.dtype,
    old: int,
    new: int,
    kv_heads: int,
    group: int,
    half: int,
    dim: int,
    hidden: int,
    late: int,
) -> None:
    step = random_prompt(seed, format_, dtype, old, new, kv_heads, group, half, dim, hidden, late=late)
    cut, parts, expected = new // 2, step.copy(), token_by_token(step.copy(), form)
    y = run(step)
    assert_near(y, expected, 0.06 if dtype == torch.bfloat16 else 1e-3)
    assert same_bits(torch.cat([run(prompt(parts, 0, cut)), run(prompt(parts, cut, new))]), y) or cut < 2
    for whole, apart in zip(step.layers, parts.layers, strict=True):
        assert (same_bits(whole.k, apart.k) and same_bits(whole.v, apart.v)) or cut < 2


@pytest.mark.parametrize("format_", CODED)
def test_more_tokens_than_are_taken_together(form: str, format_: str) -> None:
    step = random_prompt(3, format_, torch.float32, 5, 900, 1, 2, 4, 40, 70)
    expected, parts = token_by_token(step.copy(), form), step.copy()
    y = run(step)
    assert_near(y, expected, 1e-3)
    assert same_bits(torch.cat([run(prompt(parts, 0, 333)), run(prompt(parts, 333, 900))]), y)
