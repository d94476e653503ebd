"""Rotary scaling in a GGUF file: `rope.scaling.*` in the metadata or, for LLaMA 3.1, a tensor of divisors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.gguf.tensors import read_tensor
from llama_mini.errors import CheckpointFormatError, ConfigError
from llama_mini.model.rope_scaling import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    exponents,
)
from llama_mini.validate import check_choice, short_repr

DIVISORS = "rope_freqs.weight"
_SCALING = ("type", "factor", "original_context_length", "attn_factor", "finetuned", "yarn_beta_fast", "yarn_beta_slow")
ROPE_KEYS = {*(f"rope.scaling.{name}" for name in _SCALING), "rope.scale_linear"}
_LLAMA_3 = [  # as Meta published them: factor 8 for LLaMA 3.1 and 3.3, factor 32 for LLaMA 3.2
    Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    for factor in (8.0, 32.0)
]


def gguf_scaling(get: Callable[..., Any], header: GGUFHeader, max_seq_len: Any, theta: Any) -> RopeScaling | None:
    """The file's scaling; `get(key, default)` reads its metadata. Raises ConfigError, CheckpointFormatError."""
    divisors = _divisors(header, theta)
    kind = get("rope.scaling.type", None)
    factor = get("rope.scaling.factor", None)
    older = get("rope.scale_linear", None)
    if kind is None and (factor or older) not in (None, 0.0, 1.0):  # llama.cpp takes a factor without a type as linear
        kind, factor = "linear", factor or older
    if kind is not None:
        check_choice("rope.scaling.type", kind, ("none", "linear", "yarn"), ConfigError)
    if get("rope.scaling.attn_factor", 1.0) != 1:
        raise ConfigError(
            f"rope.scaling.attn_factor is {short_repr(get('rope.scaling.attn_factor'))}; only 1 is implemented"
        )
    if kind in (None, "none") or factor in (None, 0.0, 1.0):
        return divisors
    if divisors is not None:
        raise ConfigError(f"rope.scaling.type is {kind}, and {DIVISORS} scales the frequencies too; only one may")
    if kind == "linear":
        return LinearScaling(factor=factor)
    return YarnScaling(
        factor=factor,
        original_max_seq_len=get("rope.scaling.original_context_length", max_seq_len),
        beta_fast=get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", 1.0),
    )


def _divisors(header: GGUFHeader, theta: Any) -> RopeScaling | None:
    """`rope_freqs.weight`, the divisors of the frequencies, as a scaling: LLaMA 3.1's rule if they follow it."""
    tensor = header.tensors.get(DIVISORS)
    if tensor is None:
        return None
    if len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise CheckpointFormatError(f"{header.path}: {DIVISORS} has the shape {tensor.shape}, not half of head_dim")
    with header.path.open("rb") as file:
        divisors = read_tensor(file, tensor)
    if isinstance(theta, float | int) and theta > 0:
        plain = 1.0 / float(theta) ** exponents(2 * len(divisors))
        for rule in _LLAMA_3:
            if torch.allclose(plain / rule.frequencies(plain, theta), divisors, rtol=1e-5, atol=0):
                return rule
    if np.all(divisors.numpy() == 1):
        return None
    return FactorScaling(factors=tuple(divisors.tolist()))
