"""The forward pass of any norm plan in float64 NumPy, written from the formulas: it shares no code with the package."""

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

    x = norm(state["tok_embeddings.weight"][tokens], "embed_norm", plan.embed)
    for layer in range(config.n_layers):
        for name, branch in (("attention", _attention), ("feed_forward", _feed_forward)):
            found = getattr(plan, name)
            for override in plan.overrides:
                if override.first <= layer <= override.last and getattr(override, name) is not None:
                    found = getattr(override, name)
            at = f"layers.{layer}.{name}"
            y = branch(norm(x, f"{at}.pre_norm", found.pre), at, found, config, state, norm)
            x = found.alpha * x + found.beta * norm(y, f"{at}.out_norm", found.out)
            x = norm(x, f"{at}.post_norm", found.post)
    x = norm(x, "norm", plan.final)
    return x @ state["tok_embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"].T


def frequencies(config: Any) -> Array:
    """Radians per position of each pair (D/2,), with the scaling of LLaMA 3.1."""
    plain = 1 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_max_seq_len * plain / (2 * np.pi)  # that a pair makes within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotate(x: Array, positions: Array, per_position: Array) -> Array:
    """x (..., T, heads, D): elements i and i + D/2 are one complex number, which turns with its position."""
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * np.exp(1j * np.multiply.outer(positions, per_position))[..., None, :]
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _attention(x: Array, at: str, plan: Any, config: Any, state: Mapping[str, Array], norm: Norm) -> Array:
    n_tokens, turns = x.shape[1], frequencies(config)

    def project(which: str, heads: int) -> Array:
        y = norm(x @ state[f"{at}.{which}_proj.weight"].T, f"{at}.{which}_norm", getattr(plan, which))
        return np.repeat(y.reshape(*x.shape[:2], heads, config.head_dim), config.n_heads // heads, axis=2)

    q = rotate(project("q", config.n_heads), np.arange(n_tokens), turns)
    k = rotate(project("k", config.n_kv_heads), np.arange(n_tokens), turns)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(config.head_dim)
    scores = np.where(np.tri(n_tokens, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    y = np.einsum("bhqk,bkhd->bqhd", shares, project("v", config.n_kv_heads)).reshape(*x.shape[:2], -1)
    return norm(y, f"{at}.mid_norm", plan.mid) @ state[f"{at}.o_proj.weight"].T


def _feed_forward(x: Array, at: str, plan: Any, config: Any, state: Mapping[str, Array], norm: Norm) -> Array:
    gate = x @ state[f"{at}.gate_proj.weight"].T
    y = gate / (1 + np.exp(-gate)) * (x @ state[f"{at}.up_proj.weight"].T)
    return norm(y, f"{at}.mid_norm", plan.mid) @ state[f"{at}.down_proj.weight"].T


def _norm(x: Array, spec: Any, address: str, state: Mapping[str, Array], default_eps: float) -> Array:
    weight = state.get(f"{address}.weight")
    gain = {"w": weight, "1+w": None if weight is None else 1 + weight, "none": 1.0}[spec.gain]
    eps = default_eps if spec.eps is None else spec.eps
    return spec.scale * gain * normalised(x, spec.kind, eps, state.get(f"{address}.alpha"))


def normalised(x: Array, kind: str, eps: float, alpha: Array | None = None) -> Array:
    """A norm of any kind before its gain; `alpha` is dyt's."""

    def mean_square(values: Array) -> Array:
        return np.mean(np.square(values), axis=-1, keepdims=True)

    if kind == "dyt":
        return np.tanh(alpha * x)
    if kind == "layer":
        return (x - np.mean(x, axis=-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + eps)
    if kind == "l2":
        return x / np.sqrt(np.linalg.norm(x, axis=-1, keepdims=True) ** 2 + eps)
    if kind == "prms":  # the first sixteenth of the row
        return x / np.sqrt(mean_square(x[..., : max(1, round(x.shape[-1] / 16))]) + eps)
    assert kind in ("rms", "scale")
    return x / np.sqrt(mean_square(x) + eps)
