"""Rotary position embedding: cosines and sines of positions, and the rotation. rope_scaling.py has the scaling rules.

Elements i and i + R/2 of a head are rotated as a pair, R the number of elements that are: the split-half layout of
Hugging Face. Meta's files interleave the pairs instead. Source: Su et al. 2021 (RoFormer).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama_mini.model.config import LlamaConfig
from llama_mini.model.rope_scaling import LengthScaling, RopeScaling, YarnScaling, exponents

Rope = tuple[Tensor, ...]  # cosines and sines (B, T, 1, R/2), float32 in any model; with q_growth the factor of queries


def inverse_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair: (R/2,) float32, rounded as in transformers; with longrope two such rows."""
    plain = 1.0 / theta ** exponents(rotary_dim)
    return plain if scaling is None else scaling.frequencies(plain, theta)


class RotaryEmbedding(nn.Module):
    """positions (B, T) int64 -> Rope.

    R is the config's `rotary_dim`. `sliding`: for the layers with a window, where they have a rotation of their own.
    `cached`: a KVCache keeps what is rotated here; LengthScaling says why that matters.
    """

    def __init__(self, config: LlamaConfig, sliding: bool = False) -> None:
        super().__init__()
        self.config, self.sliding = config, sliding
        self.inv_freq = inverse_frequencies(config.rotary_dim, *self.rule)

    @property
    def rule(self) -> tuple[float, RopeScaling | None]:
        """The base of the frequencies, and their scaling."""
        config = self.config
        if self.sliding and config.sliding_rope_theta is not None:
            return config.sliding_rope_theta, config.sliding_rope_scaling
        return config.rope_theta, config.rope_scaling

    def forward(self, positions: Tensor, cached: bool = False) -> Rope:
        (theta, scaling), inv_freq, context = self.rule, self.inv_freq, self.config.max_seq_len
        if isinstance(scaling, LengthScaling):
            length = positions.new_full((), context) if cached else positions.max() + 1
            inv_freq = scaling.for_length(inv_freq, length, context, theta)
        angles = (positions[..., None].float() * inv_freq)[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        if scaling is not None and scaling.magnitude != 1:
            cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
        if isinstance(scaling, YarnScaling) and scaling.q_growth:
            return cos, sin, scaling.q_factor(positions[:, :, None, None])
        return cos, sin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # Not a buffer: .to(bfloat16) would round it, and with it the angle at position 15,962. Only its device changes.
        device = fn(torch.empty(0, device=self.inv_freq.device)).device
        self.inv_freq = self.inv_freq if device.type == "meta" else self.inv_freq.to(device)
        return super()._apply(fn, recurse)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotates each pair of x (B, T, heads, D) by its angle, in float32, and rounds once to x's dtype.

    The pairs are those of the first R elements; the others stay.
    """
    cos, sin = rope[:2]
    a, b, *rest = x.split(cos.shape[-1], dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *rest), dim=-1).to(x.dtype)
