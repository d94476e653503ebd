"""Native attention, alone and in whole layers, in every form that the processor has, against float64."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_mini.optimize.build import FORMS
from tests.optimize import twins
from tests.optimize.twins import (
    FORMATS,
    Cache,
    Gain,
    Layer,
    Step,
    each_form,
    generator,
    norm_of,
    random,
    random_matrix,
    same_bits,
)

few = settings(max_examples=25, deadline=None, derandomize=True)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**32)
op = torch.ops.llama_mini
NO_NORM = {dtype: Gain(torch.empty(0, dtype=dtype), 0.0, False) for dtype in (torch.float32, torch.bfloat16)}

form = pytest.fixture(scope="module", params=FORMS)(each_form)


class Heads(NamedTuple):
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    k: Tensor
    v: Tensor
    norms: list[Gain]
    window: int
    heads: int
    codes: bool

    def run(self) -> Tensor:
        gains, eps, late = (list(each) for each in zip(*self.norms, strict=True))
        return op.attend(*self[:6], gains, eps, [int(each) for each in late], self.window, self.heads, self.codes)

    def twin(self) -> Tensor:
        kv_heads, dim, block = self.k.shape[1], self.k.shape[3], 16 if self.codes else 1
        begin, parts = 0, []
        for n in (self.heads, kv_heads, kv_heads):
            parts.append(self.qkv[0, :, begin : begin + n * dim].reshape(-1, n, dim))
            begin += -(-n * dim // block) * block
        at, cache = self.positions[0], Cache(self.k[0], self.v[0])
        return twins.attend(*parts, self.cos, self.sin, at, cache, self.norms, self.window)


def random_heads(
    seed: int, dtype: torch.dtype, new: int, old: int, kv_heads: int, group: int, half: int, window: int, kind: int
) -> Heads:
    """kind: bit 0 norms, bit 1 late, bit 2 parts that begin with a block. The cache's end holds NaN."""
    rng, dim, heads = generator(seed), 2 * half, kv_heads * group
    parts = [heads * dim, kv_heads * dim, kv_heads * dim]
    width = sum(-(-n // 16) * 16 for n in parts)
    angles = torch.rand(new, half, generator=rng) * 6
    caches = [random((1, kv_heads, old + new + 5, dim), dtype, rng) for _ in range(2)]
    for cache in caches:
        cache[:, :, old:] = torch.nan
    norms = [norm_of(dim, dtype, rng, bool(kind & 2)) if kind & 1 else NO_NORM[dtype] for _ in range(2)]
    positions = torch.arange(old, old + new)[None]
    qkv = random((1, new, width), dtype, rng)
    return Heads(qkv, angles.cos(), angles.sin(), positions, *caches, norms, window, heads, bool(kind & 4))


# --- one new token a row, through some layers ---


def random_step(
    seed: int,
    format_: str,
    dtype: torch.dtype,
    batch: int,
    kv_heads: int,
    group: int,
    half: int,
    dim: int,
    hidden: int,
    longest: int = 40,
    bias: bool = False,
    norms: bool = True,
    late: int = 0,
) -> Step:
    """Two layers, the second with a window; rows of the batch stand anywhere. late: a bit for each norm of a layer."""
    rng, head_dim = generator(seed), 2 * half
    heads = kv_heads * group
    positions = torch.randint(longest, (batch, 1), generator=rng)
    angles = torch.rand(batch, half, generator=rng) * 6
    layers = []
    for window in (0, 9):
        parts = [[n * head_dim for n in (heads, kv_heads, kv_heads)], [dim], [hidden, hidden], [dim]]
        widths = [dim, heads * head_dim, dim, hidden]
        matrices = [
            random_matrix(format_, rows, width, dtype, rng, bias) for rows, width in zip(parts, widths, strict=True)
        ]
        caches = [random((batch, kv_heads, longest + 3, head_dim), dtype, rng) for _ in range(2)]
        for cache in caches:
            for row, position in zip(cache, positions, strict=True):
                row[:, int(position) :] = torch.nan
        gains = [norm_of(n, dtype, rng, bool(late >> i & 1)) for i, n in enumerate((dim, head_dim, head_dim, dim))]
        layers.append(Layer(gains if norms else [NO_NORM[dtype]] * 4, matrices, *caches, window))
    return Step(random((batch, dim), dtype, rng), angles.cos(), angles.sin(), positions, layers, heads, hidden)


heads_shapes = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 8),
    "half": st.integers(1, 40),
}


@given(
    seed=seeds,
    dtype=dtypes,
    new=st.integers(1, 60),
    old=st.integers(0, 90),
    window=st.sampled_from([0, 1, 7, 64, 200]),
    kind=st.integers(0, 7),
    **heads_shapes,
)
@few
def test_attend(
    form: str,
    seed: int,
    dtype: torch.dtype,
    new: int,
    old: int,
    kv_heads: int,
    group: int,
    half: int,
    window: int,
    kind: int,
) -> None:
    heads = random_heads(seed, dtype, new, old, kv_heads, group, half, window, kind)
    twin = heads._replace(k=heads.k.clone(), v=heads.v.clone())
    before = [tensor.clone() for tensor in heads[:4]]
    y, expected = heads.run(), twin.twin()
    assert y.dtype == dtype
    assert_near(y[0], expected, 3e-6 if dtype == torch.float32 else 0.012)
    assert_same_caches(heads.k, heads.v, twin.k, twin.v)
    assert all(same_bits(tensor, old) for tensor, old in zip(heads[:4], before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("new", "old", "window"), [(1, 2100, 0), (130, 1900, 0), (50, 1900, 600)])
def test_attend_to_long_rows(form: str, dtype: torch.dtype, new: int, old: int, window: int) -> None:
    heads = random_heads(1, dtype, new, old, 2, 3, 16, window, 3)
    expected = heads._replace(k=heads.k.clone(), v=heads.v.clone()).twin()
    assert_near(heads.run()[0], expected, 3e-6 if dtype == torch.float32 else 0.012)


@pytest.mark.parametrize("format_", FORMATS)
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 17),
    dim=st.integers(1, 70),
    hidden=st.integers(1, 70),
    bias=st.booleans(),
    norms=st.booleans(),
    late=st.integers(0, 15),
    **heads_shapes,
)
@few
def test_layers(
    form: str,
    format_: str,
    seed: int,
    dtype: torch.dtype,
    batch: int,
    kv_heads: int,
    group: int,
    half: int,
    dim: int,
    hidden: int,
    bias: bool,
    norms: bool,
    late: int,
) -> None:
    step = random_step(
        seed, format_, dtype, batch, kv_heads, group, half, dim, hidden, bias=bias, norms=norms, late=late
    )
    alone = [step.row(b) for b in range(batch)]
    twin, x = step.copy(), step.x.clone()
    y, expected = step.run(), twin.twin(form)
    assert y.dtype == dtype
    assert_near(y, expected, 0.03 if dtype == torch.bfloat16 else 2e-5 if format_ == "float" else 1e-3)
    assert same_bits(step.x, x)
    for b, row in enumerate(alone):
        assert same_bits(row.run(), y[b : b + 1])
        assert all(
            same_bits(one.k[0], all_.k[b]) and same_bits(one.v[0], all_.v[b])
            for one, all_ in zip(row.layers, step.layers, strict=True)
        )


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_of_thousands_of_positions(form: str, format_: str) -> None:
    step = random_step(3, format_, torch.float32, 5, 2, 3, 8, 40, 50, longest=2500)
    alone = step.row(3)
    expected = step.copy().twin(form)
    y = step.run()
    assert_near(y, expected, 2e-5 if format_ == "float" else 1e-3)
    assert same_bits(alone.run()[0], y[3])


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("late", [0, 15])
def test_each_norm_of_a_layer_rounds_where_it_says(form: str, slot: int, late: int) -> None:
    step = random_step(5, "float", torch.bfloat16, 16, 2, 2, 16, 128, 128, late=late)
    step = step._replace(layers=step.layers[:1])
    norms = list(step.layers[0].norms)
    norms[slot] = norms[slot]._replace(late=not norms[slot].late)
    other = step.copy()
    other.layers[0] = other.layers[0]._replace(norms=norms)
    right, wrong = step.copy().twin(form), other.twin(form)
    y = step.run()
    assert (y != right).double().mean() < 0.8 * (y != wrong).double().mean()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_shows(form: str, format_: str, bad: float) -> None:
    step = random_step(9, format_, torch.float32, 6, 2, 3, 9, 37, 51)
    clean = step.copy().run()
    step.x[2, 5] = bad
    y = step.run()
    assert not y[2].isfinite().any()
    others = torch.arange(6) != 2
    assert same_bits(y[others], clean[others])


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FC001FF])
def test_any_nan_among_the_keys_shows(form: str, bits: int) -> None:
    nan = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    heads = random_heads(4, torch.float32, 1, 20, 1, 2, 5, 0, 0)
    heads.k[0, 0, 11] = nan
    assert heads.run().isnan().all()
    step = random_step(4, "float", torch.float32, 2, 1, 2, 5, 20, 20, longest=40)
    step.layers[0].k[1, 0, 0] = nan
    step.positions[1] = 1
    assert step.run()[1].isnan().all()


def assert_near(found: Tensor, expected: Tensor, share: float) -> None:
    """Apart by no more than a share of the largest element of a row, or of one."""
    size = expected.abs().amax(-1, keepdim=True).clamp_min(1)
    assert ((found - expected).abs() <= share * size).all(), ((found - expected).abs() / size).max()


def assert_same_caches(k: Tensor, v: Tensor, twin_k: Tensor, twin_v: Tensor) -> None:
    """Keys to the rounding of a norm and a rotation, values to the bit, and nothing anywhere else."""
    assert same_bits(v, twin_v)
    assert torch.equal(k.isnan(), twin_k.isnan())
    assert_near(k.nan_to_num(), twin_k.nan_to_num(), 2e-6 if k.dtype == torch.float32 else 0.012)
