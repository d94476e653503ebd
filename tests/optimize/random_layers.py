"""Random layers and tokens for them, and how near the output is to that of its twin in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_mini.engine.pages import from_codes, to_codes
from llama_mini.memory import SCALE_BYTES
from llama_mini.optimize.fusable import NormArgs
from tests.optimize.layer_twins import Layer, Step, norm_of
from tests.optimize.twins import generator, random, random_matrix, same_bits

LAYER_FORMATS = ["float", "int8", "int4", "mixed"]  # mixed layers hold int5 too
INT8_CACHE = 256  # a bit of `parts`
NO_NORM = {dtype: NormArgs(torch.empty(0, dtype=dtype), 0.0, 0) for dtype in (torch.float32, torch.bfloat16)}


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
    windows: Sequence[int] = (0, 9),
    parts: int = 0,
) -> Step:
    """A token of each row, at random positions; a layer for each window. late: a bit for each norm of a layer.

    parts: bits for norms out, norms post, norms of q and k over all heads, gains 1+w, GELU, scales and caps, a rotation
        of half of a head, for none in the last layer, and for an int8 cache.
    """
    rng, head_dim = generator(seed), 2 * half
    heads = kv_heads * group
    out, post, whole, one_plus, gelu, scaled, partly, unrotated, int8 = (parts >> i & 1 for i in range(9))
    positions = torch.randint(longest, (batch, 1), generator=rng)
    angles = torch.rand(batch, 1, max(1, half // 2) if partly else half, generator=rng) * 6
    layers, none = [], NO_NORM[dtype]
    for window in windows:
        parts = [[n * head_dim for n in (heads, kv_heads, kv_heads)], [dim], [hidden, hidden], [dim]]
        widths = [dim, heads * head_dim, dim, hidden]
        matrices = [
            random_matrix(format_, rows, width, dtype, rng, bias) for rows, width in zip(parts, widths, strict=True)
        ]
        k, v = (random((batch, kv_heads, longest + 3, head_dim), dtype, rng) for _ in range(2))
        for cache in (k, v):
            for row, position in zip(cache, positions, strict=True):
                row[:, int(position) :] = torch.nan
        if int8:
            k, v = to_codes(k), to_codes(v)
        of_heads = [n * head_dim if whole else head_dim for n in (heads, kv_heads)]
        widths = [dim, *of_heads, dim * out, dim * post, dim, dim * out, dim * post]
        late_casts = [late >> i & 1 for i in (0, 1, 2, 0, 1, 3, 2, 3)]
        each = [
            norm_of(width, dtype, rng, cast + 2 * one_plus) if width else none
            for width, cast in zip(widths, late_casts, strict=True)
        ]
        scales = [0.7, 1.3, 0.4, 2.5, 1.2, 0.6] if scaled else [1.0, 1.0, head_dim**-0.5, 0.0, 1.0, 1.0]
        rotated = not unrotated or len(layers) < len(windows) - 1
        layers.append(Layer(each if norms else [none] * 8, matrices, k, v, window, scales, bool(gelu), rotated))
    return Step(random((batch, 1, dim), dtype, rng), angles.cos(), angles.sin(), positions, layers, heads, hidden)


def random_prompt(
    seed: int,
    format_: str,
    dtype: torch.dtype,
    old: int,
    new: int,
    kv_heads: int,
    group: int,
    half: int,
    dim: int,
    hidden: int,
    bias: bool = True,
    late: int = 0,
    windows: Sequence[int] = (0, 9),
    parts: int = 0,
) -> Step:
    """Tokens of one row after `old` others. The cache is NaN beyond them."""
    step = random_step(
        seed, format_, dtype, 1, kv_heads, group, half, dim, hidden, old + new, bias, True, late, windows, parts
    )
    rng = generator(seed + 1)
    for layer in step.layers:
        for cache in (layer.k, layer.v):
            cache[:] = nothing(cache)
            if old:
                filled = random((1, kv_heads, old, 2 * half), dtype, rng)
                cache[:, :, :old] = to_codes(filled) if parts & INT8_CACHE else filled
    angles = torch.rand(1, new, step.cos.shape[-1], generator=rng) * 6
    return step._replace(
        x=random((1, new, dim), dtype, rng),
        cos=angles.cos(),
        sin=angles.sin(),
        positions=torch.arange(old, old + new)[None],
    )


def nothing(cache: Tensor) -> Tensor:
    """A cache of this shape that was not written: NaN."""
    if cache.dtype != torch.int8:
        return torch.full_like(cache, torch.nan)
    return to_codes(torch.full((*cache.shape[:-1], cache.shape[-1] - SCALE_BYTES), torch.nan))


def assert_near(found: Tensor, expected: Tensor, share: float) -> None:
    """Differ by no more than a share of the largest element of a row, or of one."""
    size = expected.abs().amax(-1, keepdim=True).clamp_min(1)
    assert ((found - expected).abs() <= share * size).all(), ((found - expected).abs() / size).max()


def assert_near_caches(found: Step, expected: Step, share: float) -> None:
    """And NaN where nothing was written."""
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        for k, twin in ((ours.k, theirs.k), (ours.v, theirs.v)):
            if k.dtype == torch.int8:
                k, twin = from_codes(k, torch.float32), from_codes(twin, torch.float32)
            assert torch.equal(k.isnan(), twin.isnan())
            assert_near(k.nan_to_num(), twin.nan_to_num(), share)


def follow(step: Step, isa: str, share: float, norm_share: float = torch.inf) -> Tensor:
    """Runs the layers, and compares each with its twin for the same input: each element, and the norm of all.

    So an error does not enter a later layer, where it has no bound: the norm of a head divides it by the head's RMS,
    which may be near zero if the head has two elements.
    """
    alone, x, y = step.copy(), step.x, step.run()
    for layer in alone.layers:
        one = alone._replace(x=x, layers=[layer])
        twin = one.copy()
        x = one.run()
        twin = one.copy() if layer.k.dtype == torch.int8 else twin
        expected = twin.twin(isa)
        assert_near(x, expected, share)
        assert_near_caches(one, twin, share)
        assert (x - expected).norm() <= norm_share * expected.norm()
    assert same_bits(x, y)
    assert same_caches(step, alone)
    return y


def same_caches(a: Step, b: Step) -> bool:
    """To the bit."""
    return all(
        same_bits(one.k, other.k) and same_bits(one.v, other.v) for one, other in zip(a.layers, b.layers, strict=True)
    )
