"""What the operators for layers compute, in float64."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llama_mini.engine.pages import from_codes
from llama_mini.memory import SCALE_BYTES
from llama_mini.optimize.fusable import NormArgs
from llama_mini.optimize.packed_linear import PackedLinear
from tests.optimize.twins import apart, product_of_few, product_of_many, random_gain


def norm_of(width: int, dtype: torch.dtype, rng: torch.Generator, flags: int) -> NormArgs:
    return NormArgs(random_gain(width, dtype, rng), 1e-5, flags)


def rms_norm(x: Tensor, norm: NormArgs, dtype: torch.dtype) -> Tensor:
    if not norm.gain.numel():
        return x
    y = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    gain = norm.gain.double() + (norm.flags >> 1)
    if not norm.flags & 1:
        y, gain = y.to(dtype), gain.to(dtype)
    return (y.double() * gain.double()).to(dtype)


def turned(x: Tensor, norm: NormArgs, cos: Tensor, sin: Tensor, dtype: torch.dtype, rotated: bool) -> Tensor:
    """Heads (T, heads, D), normed where there is a norm, by head or all at once, rotated, rounded."""
    whole = norm.gain.numel() > x.shape[-1]
    y = (rms_norm(x.flatten(1), norm, dtype).view(x.shape) if whole else rms_norm(x, norm, dtype)).double()
    if not rotated:
        return y.to(dtype)
    cos, sin = (angle.double().view(len(x), 1, -1) for angle in (cos, sin))
    a, b, *rest = y.split(cos.shape[-1], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *rest), -1).to(dtype)


class Cache(NamedTuple):
    k: Tensor  # (K, S, D); or (K, S, D + 4) int8
    v: Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: Tensor,
    cache: Cache,
    layer: "Layer",
    dtype: torch.dtype,
) -> Tensor:
    """A row's new tokens, q (T, H, D), k and v (T, K, D), at positions (T,) -> (T, H * D) float64; fills the cache.

    An int8 cache must hold the new tokens' codes: where the operator rounds otherwise than float64, both are right.
    """
    window, (scale, cap) = layer.window, layer.scales[2:4]
    q, k = (turned(x, norm, cos, sin, dtype, layer.rotated) for x, norm in ((q, layer.norms[1]), (k, layer.norms[2])))
    new = k.transpose(0, 1), v.transpose(0, 1).to(dtype)
    if cache.k.dtype == torch.int8:
        cache = Cache(*(from_codes(rows, dtype if len(at) > 1 else torch.float32) for rows in cache))
        for x, stored in zip(new, cache, strict=True):
            peak = x.float().abs().amax(-1, keepdim=True)
            slack = 0.51 / 127 * peak + (1e-3 if dtype == torch.float32 else 0.03) * peak.clamp_min(1)
            assert ((stored[:, at].float() - x.float()).abs() <= slack).all()
    else:
        cache.k[:, at], cache.v[:, at] = new
    group, seen = q.shape[1] // k.shape[1], torch.arange(int(at.max()) + 1)
    keys, values = (t[:, : len(seen)].double().repeat_interleave(group, 0) for t in cache)
    scores = torch.einsum("thd,hsd->hts", q.double(), keys) * scale
    scores = torch.tanh(scores / cap) * cap if cap else scores
    hidden = seen > at[:, None]
    if window:
        hidden |= seen <= at[:, None] - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,hsd->thd", weights, values).flatten(1)


class Layer(NamedTuple):
    """One layer as layers takes it, and its cache (B, K, S, D)."""

    norms: list[NormArgs]  # attention: before, q, k, out, post; feed-forward: before, out, post
    matrices: list[PackedLinear]  # qkv, o, gate and up, down
    k: Tensor
    v: Tensor
    window: int
    scales: list[float]  # attention: of x, of y, of q·k, its cap; feed-forward: of x, of y
    gelu: bool = False
    rotated: bool = True

    @property
    def settings(self) -> list[int]:
        return [self.window, int(self.gelu), int(self.rotated) - 1, apart(self.matrices[0])]


def through(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, layer: Layer, isa: str) -> Tensor:
    """x (B, T, C), cos and sin (B, T, D / 2), positions (B, T), through one layer; fills the cache."""
    qkv, o, gate_up, down = layer.matrices
    dtype, many = x.dtype, x.shape[1] > 1
    dim = layer.k.shape[3] - (SCALE_BYTES if layer.k.dtype == torch.int8 else 0)

    def times(x: Tensor, matrix: PackedLinear) -> list[Tensor]:
        # A dot product of bfloat16 rounds its factors; the others need not, but a prompt's activations are bfloat16.
        rounds = many or (matrix.name == "float" and isa in ("avx512_bf16", "amx"))
        x = x.to(dtype) if rounds else x
        if many:
            return matrix.split(product_of_many(x, matrix, isa))
        return matrix.split(product_of_few(x, matrix, isa, dtype))

    projected = times(rms_norm(x, layer.norms[0], dtype), qkv)
    q, k, v = ((part.to(dtype) if many else part).unflatten(-1, (-1, dim)) for part in projected)
    rows = [
        attend(q[b], k[b], v[b], cos[b], sin[b], at, Cache(layer.k[b], layer.v[b]), layer, dtype)
        for b, at in enumerate(positions)
    ]
    x = added(x, times(torch.stack(rows), o)[0], layer.norms[3:5], layer.scales[:2])
    gate, up = times(rms_norm(x, layer.norms[5], dtype), gate_up)
    act = partial(torch.nn.functional.gelu, approximate="tanh") if layer.gelu else torch.nn.functional.silu
    return added(x, times(act(gate.double()) * up, down)[0], layer.norms[6:], layer.scales[4:])


def added(x: Tensor, y: Tensor, norms: Sequence[NormArgs], scales: Sequence[float]) -> Tensor:
    y = scales[0] * x.double() + scales[1] * rms_norm(y, norms[0], x.dtype).double()
    return rms_norm(y, norms[1], x.dtype).to(x.dtype)


class Step(NamedTuple):
    """One new token of each row, or a prompt: those of one row."""

    x: Tensor  # (B, T, C)
    cos: Tensor  # (B, T, D / 2)
    sin: Tensor
    positions: Tensor  # (B, T)
    layers: list[Layer]
    heads: int
    hidden: int
    pages: Tensor | None = None  # (B, n) of the caches; None: one for each row
    windowed: Tensor | None = None  # of the layers with a window; None: the same

    def row(self, b: int) -> "Step":
        """A row by itself, with a cache of its own."""
        at = slice(b, b + 1)
        layers = [layer._replace(k=layer.k[at].clone(), v=layer.v[at].clone()) for layer in self.layers]
        return self._replace(
            x=self.x[at], cos=self.cos[at], sin=self.sin[at], positions=self.positions[at], layers=layers
        )

    def part(self, start: int, end: int) -> "Step":
        """Some tokens of a prompt, with the same cache."""
        x, cos, sin, positions = (t[:, start:end].contiguous() for t in self[:4])
        return self._replace(x=x, cos=cos, sin=sin, positions=positions)

    def copy(self) -> "Step":
        return self._replace(layers=[layer._replace(k=layer.k.clone(), v=layer.v.clone()) for layer in self.layers])

    def run(self) -> Tensor:
        norms = [norm for layer in self.layers for norm in layer.norms]
        matrices = [matrix for layer in self.layers for linear in layer.matrices for matrix in linear.matrices]
        pages = torch.arange(len(self.x))[:, None] if self.pages is None else self.pages
        return torch.ops.llama_mini.layers(
            self.x,
            [self.cos, self.sin],
            [pages] if self.windowed is None else [pages, self.windowed],
            self.positions,
            [layer.k for layer in self.layers],
            [layer.v for layer in self.layers],
            *([getattr(norm, name) for norm in norms] for name in ("gain", "eps", "flags")),
            [tensor for matrix in matrices for tensor in matrix.tensors],
            [matrix.bias_or_empty for matrix in matrices],
            [n for layer in self.layers for n in layer.settings],
            [scale for layer in self.layers for scale in layer.scales],
            self.heads,
            self.hidden,
        )

    def twin(self, isa: str) -> Tensor:
        x = self.x
        for layer in self.layers:
            x = through(x, *self[1:4], layer, isa)
        return x
