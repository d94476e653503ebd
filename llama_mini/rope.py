"""Rotary position embedding: tables from positions, LLaMA 3.1's scaling, and their application.

A head's elements turn in pairs (i, i + D/2), the split halves in which Hugging Face stores q and k (Meta's files
interleave them instead). Source: Su et al. 2021 (RoFormer); the scaling is that of LLaMA 3.1's released code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_mini.config import LlamaConfig, RopeScaling

Rope = tuple[Tensor, Tensor]


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair: (head_dim / 2,) float32, with the rounding of transformers' tables."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (theta**exponents)
    return frequencies if scaling is None else _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, s: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    smooth = (s.original_max_seq_len / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    between = (1 - smooth) * frequencies / s.factor + smooth * frequencies
    scaled = torch.where(wavelengths > s.original_max_seq_len / s.low_freq_factor, frequencies / s.factor, between)
    return torch.where(wavelengths < s.original_max_seq_len / s.high_freq_factor, frequencies, scaled)


class RotaryEmbedding(nn.Module):
    """positions (B, T) int64 -> cosines and sines, each (B, T, 1, D/2) float32 whatever the model's dtype."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    def forward(self, positions: Tensor) -> Rope:
        angles = (positions[..., None].float() * self.inv_freq)[:, :, None]
        return angles.cos(), angles.sin()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # Not a buffer: .to(bfloat16) would round it, and position 15,962 would turn by the wrong angle. It moves only.
        device = fn(torch.empty(0, device=self.inv_freq.device)).device
        self.inv_freq = self.inv_freq if device.type == "meta" else self.inv_freq.to(device)
        return super()._apply(fn, recurse)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair of x (B, T, heads, D) by its angle, in float32 like the tables, and rounds once to x's dtype."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
