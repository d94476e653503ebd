"""References for the norm that share no code with it: float64 NumPy, 50-digit decimals, rounding by hand, records."""

import json
from collections.abc import Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

GOLDEN_DIR = Path(__file__).parent / "golden"
MANTISSA = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}  # significant bits, the hidden one included
SMALLEST = {torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}  # exponent of the smallest subnormal
Array = NDArray[np.float64]


def exact_rms_norm(x: Tensor, weight: Tensor | None, eps: float, gain: str = "w") -> Array:
    """The norm in float64 of the values that `x` and `weight` hold, with no rounding in between."""
    return normalised(x, eps) * effective_gain(weight, gain)


def normalised(x: Tensor, eps: float) -> Array:
    wide = x.detach().double().numpy()
    return np.asarray(wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps))


def effective_gain(weight: Tensor | None, gain: str) -> Array:
    wide = np.ones(1) if weight is None else weight.detach().double().numpy()
    return np.asarray({"w": wide, "1+w": 1 + wide, "none": np.ones(1)}[gain])


def decimal_rms_norm(x: Sequence[float], weight: Sequence[float], eps: float) -> list[Decimal]:
    """The same for one row, gain `w`, in 50 digits; a float enters with every digit it has."""
    with localcontext(prec=50):
        row = [Decimal(value) for value in x]
        root = (sum(value * value for value in row) / len(row) + Decimal(eps)).sqrt()
        return [value / root * Decimal(factor) for value, factor in zip(row, weight, strict=True)]


def round_to(x: Array, dtype: torch.dtype) -> Array:
    """`x` rounded once, to the nearest bfloat16 or float16, ties to even. bfloat16: normal numbers only."""
    if dtype is torch.float16:
        return x.astype(np.float16).astype(np.float64)
    bits = np.ascontiguousarray(x).view(np.uint64)
    drop = np.uint64(53 - MANTISSA[dtype])
    one = np.uint64(1)
    half = (one << (drop - one)) - one + ((bits >> drop) & one)  # just under a half, or a half when that rounds to even
    return ((bits + half) >> drop << drop).view(np.float64)


def emulated_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, gain: str, cast: str
) -> tuple[Array, NDArray[np.bool_]]:
    """The rounding rule by hand: early = round(round(x̂)·g), late = round(x̂·g), g in the input's dtype when early.

    x̂ is exact here and float32 in a real norm, so the second result says where the rule decides: where x̂ moved by
    eight float32 roundings either way gives the same answer.
    """
    factor = effective_gain(weight, gain)

    def rule(normed: Array) -> Array:
        if cast == "early":
            return round_to(round_to(normed, x.dtype) * round_to(factor, x.dtype), x.dtype)
        return round_to(normed * factor, x.dtype)

    normed, slack = normalised(x, eps), 2.0**-21
    low, high = rule(normed * (1 - slack)), rule(normed * (1 + slack))
    return rule(normed), low == high


def ulp_error(y: Tensor, exact: Array) -> float:
    """The largest distance of `y` from `exact`, in units of the last place that `y`'s dtype has at the exact value."""
    _, exponent = np.frexp(exact)
    ulp = np.ldexp(1.0, np.maximum(exponent - MANTISSA[y.dtype], SMALLEST[y.dtype]))
    return float(np.max(np.abs(y.detach().double().numpy() - exact) / ulp, initial=0))


class NormCall(NamedTuple):
    """A recorded call of a norm of transformers: what went in, its weight, what came out, and how to rebuild it."""

    name: str  # the module's name there
    dtype: str
    input: Tensor
    weight: Tensor
    output: Tensor
    eps: float
    gain: str
    cast: str


def read_norm_golden(name: str) -> tuple[Tensor, list[NormCall]]:
    """The token ids of tests/golden/norms_{name}.safetensors, and its calls in the order in which they ran."""
    with safe_open(GOLDEN_DIR / f"norms_{name}.safetensors", framework="pt") as file:
        calls = [
            NormCall(
                name=key.partition("/")[2],
                dtype=how["dtype"],
                input=file.get_tensor(f"{key}/input"),
                weight=file.get_tensor(f"{key}/gain"),
                output=file.get_tensor(f"{key}/output"),
                eps=how["eps"],
                gain=how["gain"],
                cast=how["cast"],
            )
            for key, how in json.loads(file.metadata()["calls"]).items()
        ]
        return file.get_tensor("tokens"), calls


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit: unlike `torch.equal`, NaN equals itself and −0 is not 0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))
