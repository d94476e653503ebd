"""RMSNorm with LLaMA's exact arithmetic, and related norms. To read the model, begin here and end with llama.py.

    y = round(x / √(mean(x²) + eps)) · g      "early": round to the input's dtype, then the gain (LLaMA, Mistral, Qwen)
    y = round(x / √(mean(x²) + eps) · g)      "late": the gain in float32, then round (OLMo 2, Gemma)

The two orders differ in a quarter of all bfloat16 elements, and in none when every gain is one. A LayerNorm with a bias
(StarCoder 2, Nemotron) is PyTorch's own operator, which rounds last.
Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; the rounding orders are those of transformers.
"""

from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_mini.errors import ConfigError
from llama_mini.validate import check_choice, check_flag, check_number, check_whole

Gain = Literal["w", "1+w", "none"]
Cast = Literal["early", "late"]


class Norm(nn.Module):
    """The steps that all norms share: widen to float32, `normalise`, round, multiply by the gain and the scale.

    Args:
        dim: width of the last dimension.
        eps: added inside the root; finite and ≥ 0 (`rms_norm_eps` of a config.json).
        gain: `w` (LLaMA), `1+w` (Gemma, whose weight starts at 0), or `none` (no weight at all).
        cast: when to round, `early` or `late`: see the top of this file.
        scale: a constant factor of the output (LayerNorm Scaling: 1/√l in layer l).
        bias: whether a learned bias is added, before the scale; LayerNorm only, and with a late cast.

    Shape: (..., dim) -> (..., dim). The output has the input's dtype: a float32 gain does not widen a bfloat16 stream.
    Computes in float32, and in float64 for a float64 input.
    """

    kind: ClassVar[str]
    n_gains: ClassVar[int | None] = None  # None: one for each element
    takes_bias: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        gain: Gain = "w",
        cast: Cast = "early",
        scale: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_whole(f"{name}: dim", dim, ConfigError)
        check_number(f"{name}: eps", eps, ConfigError, minimum=0)
        check_choice(f"{name} gain", gain, get_args(Gain), ConfigError)
        check_choice(f"{name} cast", cast, get_args(Cast), ConfigError)
        check_number(f"{name}: scale", scale, ConfigError)
        check_flag(f"{name}: bias", bias, ConfigError)
        if bias and not self.takes_bias:
            raise ConfigError(f"{name} has no bias; only LayerNorm does")
        if bias and cast != "late":
            raise ConfigError(f"{name} with a bias rounds last: give cast 'late'")
        self.dim, self.eps, self.gain, self.cast, self.scale = dim, eps, gain, cast, scale
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.make_parameters(device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def make_parameters(self, **factory: Any) -> None:
        weight = None if self.gain == "none" else nn.Parameter(torch.empty(self.n_gains or self.dim, **factory))
        self.register_parameter("weight", weight)

    def reset_parameters(self) -> None:
        """Sets the effective gain to one, and the bias to zero."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.gain == "1+w" else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float16: squares of 256 and more overflow
        normed = self.normalise(wide)
        if self.cast == "early":
            normed = normed.to(x.dtype)
        if self.weight is not None:
            weight = self.weight if self.gain == "w" else 1 + self.weight.to(wide.dtype)
            normed = normed * weight.to(normed.dtype)
        if self.scale != 1:
            normed = normed * self.scale
        return normed.to(x.dtype)

    def check_input(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.dim,):  # a width of 1 would broadcast
            raise ValueError(f"{type(self).__name__} over {self.dim} elements got an input of shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} needs a floating-point input, not {x.dtype}")

    def normalise(self, wide: Tensor) -> Tensor:
        """The arithmetic before the gain, in float32 or float64."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        scale = "" if self.scale == 1 else f", scale={self.scale:g}"
        bias = "" if self.bias is None else ", bias"
        return f"{self.dim}, eps={self.eps:g}, gain={self.gain}, cast={self.cast}{bias}{scale}"


class RMSNorm(Norm):
    """Divides each row by its root mean square, then multiplies by a gain. Arguments and shape: see Norm.

    A row that holds NaN becomes NaN; an infinity becomes NaN and the rest of its row 0; a row with ‖x‖₂ > 1.8447e19
    overflows its sum of squares and silently becomes 0; with eps = 0 a row of zeros becomes NaN.
    """

    kind = "rms"

    def normalise(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class LayerNorm(Norm):
    """Subtracts the mean of each row, then divides by its root mean square. Source: Ba et al. 2016.

    Three orders of rounding are in use: with a bias PyTorch's operator, on the input's dtype (StarCoder 2; Nemotron,
    whose 1+w is rounded to the weight's); without a gain the operator on float32 (OLMo 1); else these steps (Cohere 2).
    """

    kind = "layer"
    takes_bias = True

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return super().forward(x)
        self.check_input(x)
        weight = self.weight if self.weight is None or self.gain == "w" else 1 + self.weight
        y = F.layer_norm(
            x, (self.dim,), None if weight is None else weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )
        return y if self.scale == 1 else y * self.scale

    def normalise(self, wide: Tensor) -> Tensor:
        if self.weight is None:
            return F.layer_norm(wide, (self.dim,), eps=self.eps)
        centred = wide - wide.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)


class ScaleNorm(RMSNorm):
    """RMSNorm with a single gain. Source: Nguyen & Salazar 2019, whose g is √dim times this gain."""

    kind = "scale"
    n_gains = 1


class L2Norm(Norm):
    """Divides each row by its length √(Σx² + eps). The result is 1/√dim of what RMSNorm gives."""

    kind = "l2"

    def normalise(self, wide: Tensor) -> Tensor:
        return wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + self.eps)


class PartialRMSNorm(Norm):
    """Divides each row by the root mean square of its first elements. Source: Zhang & Sennrich 2019, section 3.2."""

    kind = "prms"
    share = 0.0625  # of the row; the paper's choice

    def normalise(self, wide: Tensor) -> Tensor:
        first = wide[..., : max(1, round(self.dim * self.share))]
        return wide * torch.rsqrt(first.pow(2).mean(-1, keepdim=True) + self.eps)


class DynamicTanh(Norm):
    """tanh(α·x) with one learned α, which starts at 0.5. It computes no statistic and does not use eps.

    Source: Zhu et al. 2025, "Transformers without Normalization", without its bias.
    """

    kind = "dyt"

    def make_parameters(self, **factory: Any) -> None:
        super().make_parameters(**factory)
        self.alpha = nn.Parameter(torch.empty(1, **factory))

    def reset_parameters(self) -> None:
        """Sets the effective gain to one, and α to 0.5."""
        super().reset_parameters()
        nn.init.constant_(self.alpha, 0.5)

    def normalise(self, wide: Tensor) -> Tensor:
        return torch.tanh(self.alpha.to(wide.dtype) * wide)


NORMS: dict[str, type[Norm]] = {
    norm.kind: norm for norm in (RMSNorm, LayerNorm, ScaleNorm, L2Norm, PartialRMSNorm, DynamicTanh)
}
