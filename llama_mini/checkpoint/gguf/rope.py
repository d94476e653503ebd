"""Rotary scaling in a GGUF file: `rope.scaling.*` in the metadata, or LLaMA 3.1's, stored as a tensor of divisors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llama_mini.checkpoint.gguf.header import GGUFHeader, shown
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

DIVISORS = "rope_freqs.weight"
_SCALING = ("type", "factor", "original_context_length", "attn_factor", "finetuned", "yarn_beta_fast", "yarn_beta_slow")
READ_ROPE = {*(f"rope.scaling.{name}" for name in _SCALING), "rope.scale_linear"}
_LLAMA_3 = [  # what Meta published: LLaMA 3.1 and 3.3, LLaMA 3.2
    Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    for factor in (8.0, 32.0)
]


def gguf_scaling(get: Callable[..., Any], header: GGUFHeader, max_seq_len: Any, theta: Any) -> RopeScaling | None:
    """The scaling of a file; `get(key, default)` asks its metadata. Raises ConfigError, CheckpointFormatError."""
    divisors = _divisors(header, theta)
    kind = get("rope.scaling.type", None)
    factor = get("rope.scaling.factor", None)
    older = get("rope.scale_linear", None)
    if kind is None and (factor or older) not in (None, 0.0, 1.0):  # llama.cpp takes a bare factor as linear
        kind, factor = "linear", factor or older
    if kind not in (None, "none", "linear", "yarn"):
        raise ConfigError(f"rope.scaling.type is {shown(kind)}; known: none, linear, yarn")
    if get("rope.scaling.attn_factor", 1.0) != 1:
        raise ConfigError(
            f"rope.scaling.attn_factor is {shown(get('rope.scaling.attn_factor'))}; only 1 is implemented"
        )
    if kind in (None, "none") or factor in (None, 0.0, 1.0):
        return divisors
    if divisors is not None:
        raise ConfigError(f"rope.scaling.type is {kind}, and {DIVISORS} scales the frequencies too; one is implemented")
    if kind == "linear":
        return LinearScaling(factor=factor)
    return YarnScaling(
        factor=factor,
        original_max_seq_len=get("rope.scaling.original_context_length", max_seq_len),
        beta_fast=get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", 1.0),
    )


def _divisors(header: GGUFHeader, theta: Any) -> RopeScaling | None:
    """`rope_freqs.weight`: LLaMA 3.1's rule if its numbers are that rule's, else the numbers themselves."""
    info = header.tensors.get(DIVISORS)
    if info is None:
        return None
    if len(info.shape) != 1 or info.shape[0] > 4096:
        raise CheckpointFormatError(f"{header.path}: {DIVISORS} has the shape {info.shape}, which is not half a head")
    with header.path.open("rb") as file:
        found = read_tensor(file, info)
    if isinstance(theta, float | int) and theta > 0:
        plain = 1.0 / float(theta) ** exponents(2 * len(found))
        for rule in _LLAMA_3:
            if torch.allclose(plain / rule.frequencies(plain, theta), found, rtol=1e-5, atol=0):
                return rule
    if np.all(found.numpy() == 1):
        return None
    return FactorScaling(factors=tuple(found.tolist()))
