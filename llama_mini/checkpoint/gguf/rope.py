"""Rotary scaling in a GGUF file: `rope.scaling.*` in the metadata, and tensors of divisors (LLaMA 3.1, longrope)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.gguf.tensors import read_tensor
from llama_mini.errors import CheckpointFormatError, ConfigError, warn
from llama_mini.model.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    exponents,
    yarn_magnitude,
)
from llama_mini.validate import check_choice, check_number

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_SCALING = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
_YARN = ("ext_factor", "attn_factor", "log_multiplier", "beta_fast", "beta_slow")
ROPE_KEYS = {f"rope.scaling.{name}" for name in _SCALING} | {f"rope.scaling.yarn_{name}" for name in _YARN}
ROPE_KEYS |= {"rope.scale_linear", "rope.dimension_sections"}
_LLAMA_3 = [  # as Meta published them: factor 8 for LLaMA 3.1 and 3.3, factor 32 for LLaMA 3.2
    Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    for factor in (8.0, 32.0)
]


def gguf_scaling(get: Callable[..., Any], header: GGUFHeader, max_seq_len: Any, theta: Any) -> RopeScaling | None:
    """The file's scaling; `get(key, default)` reads its metadata. Raises ConfigError, CheckpointFormatError.

    The arithmetic is that of llama.cpp (llama-context.cpp), also for keys with one meaning that its loader overlooks in
    these architectures, such as `yarn_beta_fast`. `yarn_attn_factor` is ignored as there, since it has two: the
    converter writes `attention_factor` and `attn_factor` of config.json to it, and only the latter is a multiplier.
    """
    kind = get("rope.scaling.type", None)
    if kind is not None:
        check_choice("rope.scaling.type", kind, ("none", "linear", "yarn", "longrope"), ConfigError)
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    if kind == "none" or factor == 0:
        factor = 1.0
    check_number("rope.scaling.factor", factor, ConfigError, 1, 10**12)
    attn_factor = get("rope.scaling.attn_factor", 1.0)
    check_number("rope.scaling.attn_factor", attn_factor, ConfigError, above=0)
    context = get("rope.scaling.original_context_length", max_seq_len)
    scaling = _from_tensors(header, theta, context, attn_factor)
    if scaling is not None and factor != 1:
        tensor = LONG if LONG in header.tensors else FREQS
        raise ConfigError(f"rope.scaling.factor is {factor:g}, and {tensor} scales the frequencies too; only one may")
    if scaling is None and kind == "longrope":
        raise ConfigError(f"rope.scaling.type is longrope, but {LONG} and {SHORT} are missing")
    if factor != 1:  # without a type it is linear
        scaling = _yarn(get, factor, context, attn_factor) if _ramps(get, kind) else LinearScaling(factor=factor)
    if attn_factor != 1 and not isinstance(scaling, YarnScaling | LongRopeScaling):
        raise ConfigError(f"rope.scaling.attn_factor is {attn_factor:g}; without yarn or longrope it must be 1")
    _warn_of_ignored(get, header, scaling)
    return scaling


def name_tensors(message: str, header: GGUFHeader) -> str:
    """A message about the fields of LongRopeScaling -> one about the tensors of the file."""
    short = SHORT if SHORT in header.tensors else FREQS
    return message.replace("rope_scaling.short_factor", short).replace("rope_scaling.long_factor", LONG)


def _ramps(get: Callable[..., Any], kind: str | None) -> bool:
    """Whether frequencies are interpolated by YaRN's ramp. `yarn_ext_factor` decides, if it is not negative."""
    share = get("rope.scaling.yarn_ext_factor", -1.0)
    check_number("rope.scaling.yarn_ext_factor", share, ConfigError)
    if share > 0 and share != 1:
        raise ConfigError(f"rope.scaling.yarn_ext_factor is {share:g}; only 0 and 1 are implemented")
    return kind == "yarn" if share < 0 else share == 1


def _yarn(get: Callable[..., Any], factor: float, context: Any, attn_factor: float) -> YarnScaling:
    mscale_all_dim = get("rope.scaling.yarn_log_multiplier", 0.0)
    check_number("rope.scaling.yarn_log_multiplier", mscale_all_dim, ConfigError, minimum=0)
    magnitude = yarn_magnitude(factor) * attn_factor
    if mscale_all_dim:
        magnitude /= yarn_magnitude(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_seq_len=context,
        attention_factor=magnitude if mscale_all_dim or attn_factor != 1 else None,
        beta_fast=get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", 1.0),
    )


def _from_tensors(header: GGUFHeader, theta: Any, context: Any, attn_factor: float) -> RopeScaling | None:
    """The divisors of the frequencies: LLaMA 3.1's rule if they follow it, else longrope with the lists themselves."""
    if LONG in header.tensors or SHORT in header.tensors:
        long, short = _divisors(header, LONG), _divisors(header, SHORT)
    elif FREQS in header.tensors:
        long = short = _divisors(header, FREQS)
        if isinstance(theta, float | int) and theta > 0:
            plain = 1.0 / float(theta) ** exponents(2 * len(long))
            for rule in _LLAMA_3:
                if torch.allclose(plain / rule.frequencies(plain, theta), long, rtol=1e-5, atol=0):
                    return rule
        if torch.all(long == 1):
            return None
    else:
        return None
    return LongRopeScaling(
        short_factor=tuple(short.tolist()),
        long_factor=tuple(long.tolist()),
        original_max_seq_len=context,
        attention_factor=attn_factor,
    )


def _divisors(header: GGUFHeader, name: str) -> Tensor:
    tensor = header.tensors.get(name)
    if tensor is None:
        raise CheckpointFormatError(f"{header.path}: {name} is missing, but not {LONG if name == SHORT else SHORT}")
    if len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise CheckpointFormatError(f"{header.path}: {name} has the shape {tensor.shape}, not half of head_dim")
    with header.path.open("rb") as file:
        return read_tensor(file, tensor)


def _warn_of_ignored(get: Callable[..., Any], header: GGUFHeader, scaling: RopeScaling | None) -> None:
    magnitude = 1.0 if scaling is None else scaling.magnitude
    given = get("rope.scaling.yarn_attn_factor", magnitude)
    check_number("rope.scaling.yarn_attn_factor", given, ConfigError)
    notes = []
    if not math.isclose(given, magnitude, rel_tol=1e-5):
        notes.append(
            f"rope.scaling.yarn_attn_factor, {given:g}, ignored as in llama.cpp: cosines and sines are multiplied by "
            f"{magnitude:.4g}"
        )
    if f"{header.metadata['general.architecture']}.rope.dimension_sections" in header.metadata:
        notes.append("rope.dimension_sections ignored, since only images and videos need it")
    if notes:
        warn(f"{header.path}: {'; '.join(notes)}")
