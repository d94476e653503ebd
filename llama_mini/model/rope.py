"""Rotary position embedding: cosines and sines of positions, and the rotation. rope_scaling.py has the scaling rules.

Elements i and i + D/2 of a head are rotated as a pair: the split-half layout of Hugging Face. Meta's files interleave
the pairs instead. Source: Su et al. 2021 (RoFormer).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_mini.model.config import LlamaConfig
from llama_mini.model.rope_scaling import LengthScaling, RopeScaling, exponents

Rope = tuple[Tensor, Tensor]


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair: (D/2,) float32, rounded as in transformers; with longrope two such rows."""
    plain = 1.0 / theta ** exponents(head_dim)
    return plain if scaling is None else scaling.frequencies(plain, theta)


class RotaryEmbedding(nn.Module):
    """positions (B, T) int64 -> cosines and sines, each (B, T, 1, D/2) float32 whatever the model's dtype.

    `cached`: a KVCache keeps what is rotated here; LengthScaling says why that matters.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    def forward(self, positions: Tensor, cached: bool = False) -> Rope:
        scaling, inv_freq, context = self.config.rope_scaling, self.inv_freq, self.config.max_seq_len
        if isinstance(scaling, LengthScaling):
            length = positions.new_full((), context) if cached else positions.max() + 1
            inv_freq = scaling.for_length(inv_freq, length, context, self.config.rope_theta)
        angles = (positions[..., None].float() * inv_freq)[:, :, None]
        if scaling is None or scaling.magnitude == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * scaling.magnitude, angles.sin() * scaling.magnitude

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # Not a buffer: .to(bfloat16) would round it, and with it the angle at position 15,962. Only its device changes.
        device = fn(torch.empty(0, device=self.inv_freq.device)).device
        self.inv_freq = self.inv_freq if device.type == "meta" else self.inv_freq.to(device)
        return super()._apply(fn, recurse)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotates each pair of x (B, T, heads, D) by its angle, in float32, and rounds once to x's dtype."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
