"""Decoding: layers for a new token of each row, in every ISA variant of this processor, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_mini.optimize.build import ISA_VARIANTS
from tests.optimize.random_layers import LAYER_FORMATS, assert_near, follow, random_step, same_caches
from tests.optimize.twins import each_isa, examples, generator, random, same_bits, some

DTYPES = [torch.float32, torch.bfloat16]

isa = pytest.fixture(scope="module", params=ISA_VARIANTS)(each_isa)


def tolerance(format_: str, dtype: torch.dtype) -> float:
    """Sums of float32; activations of 16 bits for quantized weights; or the roundings of bfloat16."""
    return 0.03 if dtype == torch.bfloat16 else 2e-5 if format_ == "float" else 1e-3


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 17),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    half=st.integers(1, 40),
    dim=st.integers(1, 70),
    hidden=st.integers(1, 70),
    bias=st.booleans(),
    norms=st.booleans(),
    late=st.integers(0, 15),
    parts=st.integers(0, 511),
)
@examples(16)
def test_layers(
    isa: str,
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
    parts: int,
) -> None:
    step = random_step(
        seed, format_, dtype, batch, kv_heads, group, half, dim, hidden, 40, bias, norms, late, parts=parts
    )
    alone = {b: step.row(b) for b in some(batch, generator(seed))}
    before = [tensor.clone() for tensor in step[:4]]
    y = follow(step, isa, tolerance(format_, dtype))
    assert y.dtype == dtype
    assert all(map(same_bits, step[:4], before))
    for b, row in alone.items():
        assert same_bits(row.run(), y[b : b + 1])
        assert same_caches(row, step.row(b))


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_thousands_of_positions(isa: str, format_: str, dtype: torch.dtype) -> None:
    step = random_step(3, format_, dtype, 5, 2, 3, 8, 40, 50, longest=2500, windows=(0, 600))
    alone = step.row(3)
    expected = step.copy().twin(isa)
    y = step.run()
    assert_near(y, expected, tolerance(format_, dtype))
    assert same_bits(alone.run(), y[3:4])


@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    half=st.integers(1, 40),
    window=st.sampled_from([0, 7, 300]),
    scale=st.floats(0.01, 2),
    softcap=st.sampled_from([0.0, 1.0, 50.0]),
)
@examples(25)
def test_attend(
    isa: str,
    seed: int,
    dtype: torch.dtype,
    batch: int,
    kv_heads: int,
    group: int,
    half: int,
    window: int,
    scale: float,
    softcap: float,
) -> None:
    """Against float64; a row has the bits that it has alone."""
    rng, heads, dim = generator(seed), kv_heads * group, 2 * half
    positions = torch.randint(600, (batch, 1), generator=rng)
    k, v = (random((batch, kv_heads, 610, dim), dtype, rng) for _ in range(2))
    qkv = random((batch, 1, heads + 2 * kv_heads, dim), dtype, rng)
    caches = k.clone(), v.clone()
    pages = torch.arange(batch)[:, None]
    y = torch.ops.llama_mini.attend(qkv, *caches, pages, positions, window, scale, softcap)
    for b, at in enumerate(positions[:, 0].tolist()):
        q, k[b, :, at], v[b, :, at] = qkv[b, 0].split((heads, kv_heads, kv_heads))
        first = max(0, at + 1 - window) if window else 0
        keys, values = (t[b, :, first : at + 1].double().repeat_interleave(group, 0) for t in (k, v))
        scores = torch.einsum("hd,hsd->hs", q.double(), keys) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), values).flatten()
        assert_near(y[b, 0].double(), expected, 0.012 if dtype == torch.bfloat16 else 2e-5)
        alone = torch.ops.llama_mini.attend(
            qkv[b : b + 1], k.clone(), v.clone(), pages[b : b + 1], positions[b : b + 1], window, scale, softcap
        )
        assert same_bits(alone, y[b : b + 1])
    assert all(map(same_bits, caches, (k, v)))


@pytest.mark.parametrize("slot", [0, 1, 2, 5])
@pytest.mark.parametrize("late", [0, 15])
def test_each_norm_of_a_layer_rounds_where_it_says(isa: str, slot: int, late: int) -> None:
    step = random_step(5, "float", torch.bfloat16, 16, 2, 2, 16, 128, 128, late=late, windows=(0,))
    norms = list(step.layers[0].norms)
    norms[slot] = norms[slot]._replace(flags=1 - norms[slot].flags)
    other = step.copy()
    other.layers[0] = other.layers[0]._replace(norms=norms)
    right, wrong = step.copy().twin(isa), other.twin(isa)
    y = step.run()
    assert (y != right).double().mean() < 0.8 * (y != wrong).double().mean()


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_shows(isa: str, format_: str, bad: float) -> None:
    step = random_step(9, format_, torch.float32, 6, 2, 3, 9, 37, 51)
    clean = step.copy().run()
    step.x[2, 0, 5] = bad
    y = step.run()
    assert not y[2].isfinite().any()
    others = torch.arange(6) != 2
    assert same_bits(y[others], clean[others])


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros(isa: str, format_: str, dtype: torch.dtype) -> None:
    step = random_step(8, format_, dtype, 3, 2, 3, 9, 37, 51)
    step.x[1] = 0
    expected = step.copy().twin(isa)
    assert_near(step.run(), expected, tolerance(format_, dtype))


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FC001FF])
def test_any_nan_among_the_keys_shows(isa: str, bits: int) -> None:
    nan = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    step = random_step(4, "float", torch.float32, 2, 1, 2, 5, 20, 20, longest=40)
    step.layers[0].k[1, 0, 0] = nan
    step.positions[1] = 1
    assert step.run()[1].isnan().all()
