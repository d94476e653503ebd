"""The forward pass of any config in float64 NumPy, written from the formulas: it shares no code with the package."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Norm = Callable[[Array, str, Any], Array]


def logits(config: Any, state: Mapping[str, Array], tokens: Array) -> Array:
    """tokens (B, T) -> (B, T, V). `state` is a state dict in float64; config and plan are read as data."""
    plan = config.norm_plan

    def norm(x: Array, address: str, spec: Any) -> Array:
        if spec is None:
            return x
        if spec.view == "head" and address[-6:] in ("q_norm", "k_norm", "v_norm"):
            heads = x.reshape(*x.shape[:-1], -1, config.head_dim)
            return _norm(heads, spec, address, state, config.norm_eps).reshape(x.shape)
        return _norm(x, spec, address, state, config.norm_eps)

    x = norm(config.embedding_scale * state["tok_embeddings.weight"][tokens], "embed_norm", plan.embed)
    for layer in range(config.n_layers):
        reads = None  # what both branches of a parallel layer read
        for name, branch in (("attention", _attention), ("feed_forward", _feed_forward)):
            found = getattr(plan, name)
            for override in plan.overrides:
                if override.first <= layer <= override.last and getattr(override, name) is not None:
                    found = getattr(override, name)
            at = f"layers.{layer}.{name}"
            reads = norm(reads if plan.parallel and name == "feed_forward" else x, f"{at}.pre_norm", found.pre)
            y = branch(reads, at, found, config, state, norm)
            alpha, beta = (state.get(f"{at}.{scale}", getattr(found, scale)) for scale in ("alpha", "beta"))
            x = alpha * x + beta * norm(y, f"{at}.out_norm", found.out)
            x = norm(x, f"{at}.post_norm", found.post)
    x = norm(x, "norm", plan.final)
    y = x @ state["tok_embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"].T
    return capped(config.logit_scale * y, config.logit_softcap)


def capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def frequencies(config: Any, sliding: bool = False) -> Array:
    """Radians per position of each pair (R/2,), with the scaling of LLaMA 3.1."""
    own = sliding and config.sliding_rope_theta is not None
    theta, scaling = (config.sliding_rope_theta if own else config.rope_theta), config.rope_scaling
    scaling = config.sliding_rope_scaling if own else scaling
    plain = 1 / theta ** (np.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    if scaling is None:
        return plain
    turns = scaling.original_max_seq_len * plain / (2 * np.pi)  # that a pair makes within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotate(x: Array, positions: Array, per_position: Array) -> Array:
    """x (..., T, heads, D): of R elements, i and i + R/2 are one complex number, which turns with its position."""
    half = len(per_position)
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * np.multiply.outer(positions, per_position))[
        ..., None, :
    ]
    return np.concatenate((turned.real, turned.imag, x[..., 2 * half :]), axis=-1)


def _attention(x: Array, at: str, plan: Any, config: Any, state: Mapping[str, Array], norm: Norm) -> Array:
    positions, layer = np.arange(x.shape[1]), int(at.split(".")[1])
    sliding = layer in config.sliding_layers

    def turn(y: Array, heads: int) -> Array:
        if layer in config.unrotated_layers:
            return y
        split = y.reshape(*y.shape[:2], heads, config.head_dim)
        return rotate(split, positions, frequencies(config, sliding)).reshape(y.shape)

    def project(which: str, heads: int) -> Array:
        y = linear(x, f"{at}.{which}_proj", state)
        if which != "v" and config.qk_norm_after_rope:
            y = turn(y, heads)
        y = norm(y, f"{at}.{which}_norm", getattr(plan, which))
        if which != "v" and not config.qk_norm_after_rope:
            y = turn(y, heads)
        return np.repeat(y.reshape(*x.shape[:2], heads, config.head_dim), config.n_heads // heads, axis=2)

    q, k, v = project("q", config.n_heads), project("k", config.n_kv_heads), project("v", config.n_kv_heads)
    scale = 1 / np.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale
    scores = capped(np.einsum("bqhd,bkhd->bhqk", q, k) * scale, config.attention_softcap)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < (config.sliding_window if sliding else np.inf))
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    y = np.einsum("bhqk,bkhd->bqhd", shares, v).reshape(*x.shape[:2], -1)
    return linear(norm(y, f"{at}.mid_norm", plan.mid), f"{at}.o_proj", state)


def _feed_forward(x: Array, at: str, plan: Any, config: Any, state: Mapping[str, Array], norm: Norm) -> Array:
    up = norm(linear(x, f"{at}.up_proj", state), f"{at}.up_norm", plan.up)
    inner = ACTIVATIONS[config.activation](up)
    if config.gated_mlp:
        gate = norm(linear(x, f"{at}.gate_proj", state), f"{at}.gate_norm", plan.gate)
        inner = up * ACTIVATIONS[config.activation](gate)
    return linear(norm(inner, f"{at}.mid_norm", plan.mid), f"{at}.down_proj", state)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu_tanh": lambda z: (
        z / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    ),  # 1 + tanh u = 2 / (1 + e⁻²ᵘ)
    "gelu": lambda z: z / 2 * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
    "relu2": lambda z: np.where(z > 0, z * z, 0),
}


def linear(x: Array, at: str, state: Mapping[str, Array]) -> Array:
    return x @ state[f"{at}.weight"].T + state.get(f"{at}.bias", 0.0)


def _norm(x: Array, spec: Any, address: str, state: Mapping[str, Array], default_eps: float) -> Array:
    weight = state.get(f"{address}.weight")
    gain = {"w": weight, "1+w": None if weight is None else 1 + weight, "none": 1.0}[spec.gain]
    eps = default_eps if spec.eps is None else spec.eps
    numbers = {name: state.get(f"{address}.{name}") for name in ("alpha", "shift", "inverse_rms")}
    normed = gain * normalised(x, spec.kind, eps, groups=spec.groups, power=spec.power, **numbers)
    return spec.scale * (normed + state.get(f"{address}.bias", 0.0))


def normalised(
    x: Array,
    kind: str,
    eps: float,
    alpha: Array | None = None,
    shift: Array | None = None,
    inverse_rms: Array | None = None,
    groups: int = 1,
    power: float = 1,
) -> Array:
    """A norm of any kind before its gain; `alpha` is dyt's and derf's, `shift` derf's, `inverse_rms` frozen's."""

    def mean_square(values: Array) -> Array:
        return np.mean(np.square(values), axis=-1, keepdims=True)

    if kind == "dyt":
        return np.tanh(alpha * x)
    if kind == "derf":
        return np.vectorize(math.erf, otypes=[float])(alpha * x + shift)
    if kind == "frozen":
        return x * inverse_rms
    if kind == "power":
        return x / np.sqrt(mean_square(x) + eps) ** power
    if kind == "group":
        return np.concatenate([normalised(part, "rms", eps) for part in np.split(x, groups, axis=-1)], axis=-1)
    if kind == "crms":  # with the element that makes the sum zero
        whole = np.concatenate([x, -np.sum(x, axis=-1, keepdims=True)], axis=-1)
        return (whole / np.sqrt(mean_square(whole) + eps))[..., :-1]
    if kind == "layer":
        return (x - np.mean(x, axis=-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + eps)
    if kind == "l2":
        return x / np.sqrt(np.linalg.norm(x, axis=-1, keepdims=True) ** 2 + eps)
    if kind == "prms":  # the first sixteenth of the row
        return x / np.sqrt(mean_square(x[..., : max(1, round(x.shape[-1] / 16))]) + eps)
    assert kind in ("rms", "scale")
    return x / np.sqrt(mean_square(x) + eps)
