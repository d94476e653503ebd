"""Prefill: layers for the tokens of a prompt, in every ISA variant of this processor, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_mini.optimize.build import ISA_VARIANTS
from tests.optimize.layer_twins import Step
from tests.optimize.random_layers import (
    LAYER_FORMATS,
    NO_NORM,
    assert_near,
    assert_near_caches,
    follow,
    random_prompt,
    random_step,
    same_caches,
)
from tests.optimize.twins import each_isa, examples, generator, same_bits

DTYPES = [torch.float32, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32)

isa = pytest.fixture(scope="module", params=ISA_VARIANTS)(each_isa)


def follow_prompt(step: Step, format_: str, isa: str) -> Tensor:
    """Compares float32 to its sums, or to activations of 16 bits; bfloat16 to five standard deviations of roundings.

    Where operator and twin round a bfloat16 differently, they differ by 2^-7 / √6 of it, in the seven roundings of a
    layer by √7 times that, 0.0084. Activations of eight bits differ by peak / 127 / √6, or 0.008 for a peak of 2.5 RMS:
    with the four products of a layer 0.018 in all. The norm of T tokens' errors itself varies by 1 / √(2T). A norm on
    a branch's output divides by its RMS, which may be a third of that of its terms.
    """
    eight_bits = format_ != "float" and isa != "amx" and not (isa == "avx2" and format_ == "int8")
    error = 0.018 if eight_bits else 0.0084
    if any(layer.norms[3].gain.numel() for layer in step.layers):
        error *= 3
    if step.x.dtype == torch.float32:
        return follow(step, isa, 2e-5 if format_ == "float" else 1e-3)
    return follow(step, isa, 5 * error, error * (1 + 5 / (2 * step.x.shape[1]) ** 0.5))


def in_parts(step: Step, *ends: int) -> Tensor:
    return torch.cat([step.part(start, end).run() for start, end in zip((0, *ends), ends, strict=False)], 1)


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@given(
    seed=seeds,
    dtype=dtypes,
    old=st.integers(0, 30),
    new=st.integers(2, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 40),
    dim=st.integers(8, 100),
    hidden=st.integers(8, 100),
    bias=st.booleans(),
    late=st.integers(0, 15),
    parts=st.integers(0, 511),
)
@examples(16)
def test_a_prompt_through_layers(
    isa: str,
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
    bias: bool,
    late: int,
    parts: int,
) -> None:
    step = random_prompt(seed, format_, dtype, old, new, kv_heads, group, half, dim, hidden, bias, late, parts=parts)
    parts, before, cut = step.copy(), [tensor.clone() for tensor in step[:4]], new // 2
    y = follow_prompt(step, format_, isa)
    assert y.dtype == dtype
    assert all(map(same_bits, step[:4], before))
    if cut > 1:  # one token is a step
        assert same_bits(in_parts(parts, cut, new), y)
        assert same_caches(step, parts)


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tokens_than_are_taken_together(isa: str, format_: str, dtype: torch.dtype) -> None:
    step = random_prompt(3, format_, dtype, 5, 900, 1, 2, 4, 40, 70)
    parts = step.copy()
    assert same_bits(in_parts(parts, 333, 900), follow_prompt(step, format_, isa))
    assert same_caches(step, parts)


# --- attention ---


def only_attention(step: Step, norms: bool) -> Step:
    """Nothing follows attention, and q, k and v are sums of eighths, exact in every ISA variant."""
    rng = generator(6)
    step.x.copy_(torch.randint(-3, 4, step.x.shape, generator=rng))
    layers = []
    for layer in step.layers:
        qkv, _, _, down = layer.matrices
        qkv.tensors[0].copy_(torch.randint(-1, 2, qkv.tensors[0].shape, generator=rng) / 8)
        down.tensors[0].zero_()
        none = NO_NORM[step.x.dtype]
        of_heads = layer.norms[1:3] if norms else [none] * 2
        layers.append(layer._replace(norms=[none, *of_heads, none, none, layer.norms[5], none, none]))
    return step._replace(layers=layers)


def assert_attends(step: Step, isa: str) -> None:
    """To float32 sums; in bfloat16 to the roundings of a head, its weights, the cache and the residual stream."""
    share = 4e-6 if step.x.dtype == torch.float32 else 0.012
    twin = step.copy()
    y, expected = step.run(), twin.twin(isa)
    assert_near(y, expected, share)
    assert_near_caches(step, twin, share / 2)
    for ours, theirs in zip(step.layers, twin.layers, strict=True):
        assert torch.equal(ours.v.nan_to_num(9), theirs.v.nan_to_num(9))


@given(
    seed=seeds,
    dtype=dtypes,
    new=st.integers(2, 60),
    old=st.integers(0, 90),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    half=st.integers(1, 40),
    dim=st.integers(1, 70),
    window=st.sampled_from([0, 1, 7, 64, 200]),
    norms=st.booleans(),
    late=st.sampled_from([0, 15]),
)
@examples(25)
def test_attention(
    isa: str,
    seed: int,
    dtype: torch.dtype,
    new: int,
    old: int,
    kv_heads: int,
    group: int,
    half: int,
    dim: int,
    window: int,
    norms: bool,
    late: int,
) -> None:
    step = random_prompt(seed, "float", dtype, old, new, kv_heads, group, half, dim, 1, False, late, [window])
    assert_attends(only_attention(step, norms), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("new", "old", "window"), [(2, 2100, 0), (130, 1900, 0), (50, 1900, 600)])
def test_attention_to_long_rows(isa: str, dtype: torch.dtype, new: int, old: int, window: int) -> None:
    step = random_prompt(1, "float", dtype, old, new, 2, 3, 16, 40, 1, False, 15, [window])
    assert_attends(only_attention(step, True), isa)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FC001FF])
def test_any_nan_among_the_keys_shows(isa: str, bits: int) -> None:
    step = random_prompt(4, "float", torch.float32, 20, 3, 1, 2, 5, 20, 20)
    step.layers[0].k[0, 0, 11] = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    assert step.run().isnan().all()


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_leaves_earlier_blocks_alone(
    isa: str, format_: str, dtype: torch.dtype, bad: float
) -> None:
    step = random_prompt(9, format_, dtype, 0, 140, 2, 3, 9, 37, 51, windows=[0])
    clean = step.copy().run()
    step.x[0, 70, 5] = bad
    y = step.run()
    assert not y[0, 70:].isfinite().any()
    assert same_bits(y[:, :48], clean[:, :48])


# --- norms and SiLU ---


@pytest.mark.parametrize("slot", [0, 1, 2, 5])
@pytest.mark.parametrize("late", [0, 15])
def test_each_norm_of_a_layer_rounds_where_it_says(isa: str, slot: int, late: int) -> None:
    """Looks where no other rounding hides it: in the cache, in large scores, after attention that adds nothing."""
    step = random_prompt(5, "float", torch.bfloat16, 0, 40, 2, 2, 16, 128, 128, False, late, [0])
    norms = list(step.layers[0].norms)
    if slot == 1:
        norms[1].gain.mul_(16)
    if slot == 5:
        step.layers[0].matrices[1].tensors[0].zero_()
    norms[slot] = norms[slot]._replace(flags=1 - norms[slot].flags)
    right, wrong = step.copy(), step.copy()
    wrong.layers[0] = wrong.layers[0]._replace(norms=norms)
    found = [
        {0: each.layers[0].v, 2: each.layers[0].k}.get(slot, y)[:, :, :40]
        for each, y in ((step, step.run()), (right, right.twin(isa)), (wrong, wrong.twin(isa)))
    ]
    ours, right_ones, wrong_ones = found
    most = 0.6 if slot == 1 else 0.01  # weights of attention are rounded too
    assert (ours != right_ones).double().mean() < most * (ours != wrong_ones).double().mean()


@pytest.mark.parametrize("format_", LAYER_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_of_zeros(isa: str, format_: str, dtype: torch.dtype) -> None:
    step = random_prompt(8, format_, dtype, 3, 20, 2, 3, 9, 37, 51)
    step.x[0, 7] = 0
    follow_prompt(step, format_, isa)


def activated(gate: Tensor, prompt: bool, gelu: bool = False) -> Tensor:
    """From a layer that turns (gate, 0) into (gate, act(gate)), for many tokens of a row or many rows."""
    n, dtype = len(gate), gate.dtype
    step = random_step(1, "float", dtype, 1, 1, 1, 1, 2, 1, bias=True, norms=False, windows=[1])
    (layer,) = step.layers
    for matrix in layer.matrices:
        matrix.load(0, torch.zeros(matrix.parts[0], matrix.columns))
        for part, rows in enumerate(matrix.parts):
            matrix.load(part, torch.zeros(rows, matrix.columns))
            matrix.bias_destination(part).copy_(torch.zeros(rows))
    _, _, gate_up, down = layer.matrices
    gate_up.load(0, torch.tensor([[1.0, 0.0]]))
    gate_up.bias_destination(1).fill_(1)
    down.load(0, torch.tensor([[0.0], [1.0]]))
    shape = (1, n) if prompt else (n, 1)
    caches = [torch.zeros(shape[0], 1, shape[1], 2, dtype=dtype) for _ in range(2)]
    positions = torch.arange(n)[None] if prompt else torch.zeros(n, 1, dtype=torch.long)
    y = step._replace(
        x=torch.stack((gate, torch.zeros_like(gate)), -1).view(*shape, 2),
        cos=torch.ones(*shape, 1),
        sin=torch.zeros(*shape, 1),
        positions=positions,
        layers=[layer._replace(k=caches[0], v=caches[1], gelu=gelu)],
    ).run()
    assert torch.equal(y[..., 0].flatten(), gate)
    return y[..., 1].flatten()


@pytest.mark.parametrize("prompt", [False, True])
def test_silu_is_within_three_ulp_and_never_astray(isa: str, prompt: bool) -> None:
    gate = torch.cat((torch.linspace(-87, 88, 200_001), torch.linspace(-1e-3, 1e-3, 2001)))
    y, expected = activated(gate, prompt), F.silu(gate.double())
    ulp = torch.nextafter(expected.float().abs(), torch.tensor(torch.inf)).double() - expected.float().abs()
    assert ((y - expected).abs() / ulp).max() < 2.6
    far = torch.tensor([-1e30, -100, 1e30])
    y = activated(far, prompt)
    assert y[:2].abs().max() < 1e-7  # e^-x ends at e^88.3, not at infinity
    assert y[2] == far[2]


@pytest.mark.parametrize("prompt", [False, True])
def test_gelu_of_the_hyperbolic_tangent(isa: str, prompt: bool) -> None:
    gate = torch.cat((torch.linspace(-40, 40, 100_001), torch.linspace(-1e-3, 1e-3, 2001)))
    expected = F.gelu(gate.double(), approximate="tanh")
    assert ((activated(gate, prompt, gelu=True) - expected).abs() <= 2e-7 * gate.abs()).all()
    far = activated(torch.tensor([-1e10, 1e10]), prompt, gelu=True)
    assert far[0].abs() < 1e-20
    assert far[1] == 1e10


@pytest.mark.parametrize("prompt", [False, True])
def test_silu_is_rounded_once_to_bfloat16(isa: str, prompt: bool) -> None:
    gate = torch.linspace(-87, 88, 5001).bfloat16()
    y, expected = activated(gate, prompt), F.silu(gate.double())
    assert ((y - expected).abs() <= 0.501 * torch.finfo(torch.bfloat16).eps * expected.abs()).all()
