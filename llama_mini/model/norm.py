"""RMSNorm with LLaMA's exact arithmetic, and related norms. To read the model, begin here and end with llama.py.

    y = round(x / √(mean(x²) + eps)) · g      "early": round to the input's dtype, then the gain (LLaMA, Mistral, Qwen)
    y = round(x / √(mean(x²) + eps) · g)      "late": the gain in float32, then round (OLMo 2, Gemma)

The two orders differ in a quarter of all bfloat16 elements, and in none when every gain is one. A LayerNorm with a bias
(StarCoder 2, Nemotron) is PyTorch's own operator, which rounds last.
Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; the rounding orders are those of transformers.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_mini.errors import ConfigError
from llama_mini.validate import check_choice, check_flag, check_number, check_whole, join_names

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
        bias: whether a learned bias is added, before the scale; LayerNorm, dyt and derf only, and with a late cast.
        groups: the number of equal parts of a row that `group` norms apart.
        power: of the root mean square that `power` divides by; 1 is RMSNorm, 0 leaves the row as it is.

    Shape: (..., dim) -> (..., dim). The output has the input's dtype: a float32 gain does not widen a bfloat16 stream.
    Computes in float32, and in float64 for a float64 input.
    """

    kind: ClassVar[str]
    n_gains: ClassVar[int | None] = None  # None: one for each element
    takes: ClassVar[str] = ""  # which of bias, groups and power this kind has
    has_eps: ClassVar[bool] = True
    numbers: ClassVar[Mapping[str, float]] = {}  # learned beside the gain: name -> start

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        gain: Gain = "w",
        cast: Cast = "early",
        scale: float = 1.0,
        bias: bool = False,
        groups: int = 1,
        power: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_whole(f"{name}: groups", groups, ConfigError)
        check_whole(f"{name}: dim", dim, ConfigError)
        check_number(f"{name}: eps", eps, ConfigError, minimum=0)
        check_choice(f"{name} gain", gain, get_args(Gain), ConfigError)
        check_choice(f"{name} cast", cast, get_args(Cast), ConfigError)
        check_number(f"{name}: scale", scale, ConfigError)
        check_flag(f"{name}: bias", bias, ConfigError)
        check_number(f"{name}: power", power, ConfigError)
        for setting, is_given in {"bias": bias, "groups": groups != 1, "power": power != 1}.items():
            if is_given and setting not in self.takes:
                kinds = join_names(kind for kind, norm in NORMS.items() if setting in norm.takes)
                raise ConfigError(f"{name} has no {setting}; kinds with it: {kinds}")
        if dim % groups:
            raise ConfigError(f"{name}: {dim} elements are not a multiple of {groups} groups")
        if bias and cast != "late":
            raise ConfigError(f"{name} with a bias rounds last: give cast 'late'")
        self.dim, self.eps, self.gain, self.cast, self.scale = dim, eps, gain, cast, scale
        self.groups, self.power = groups, power
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        sizes = {"weight": 0 if gain == "none" else self.n_gains or dim, "bias": dim if bias else 0}
        for parameter, n in (sizes | dict.fromkeys(self.numbers, 1)).items():
            values = nn.Parameter(torch.empty(n, device=device, dtype=dtype)) if n else None
            self.register_parameter(parameter, values)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the effective gain to one, the bias to zero, and the learned numbers to their start."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.gain == "1+w" else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for name, start in self.numbers.items():
            nn.init.constant_(self.get_parameter(name), start)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float16: squares of 256 and more overflow
        normed = self.normalise(wide)
        if self.cast == "early":
            normed = normed.to(x.dtype)
        if self.weight is not None:
            weight = self.weight if self.gain == "w" else 1 + self.weight.to(wide.dtype)
            normed = normed * weight.to(normed.dtype)
        if self.bias is not None:
            normed = normed + self.bias.to(normed.dtype)
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
        given = "".join(f", {name}={getattr(self, name)}" for name in ("groups", "power") if name in self.takes)
        bias = "" if self.bias is None else ", bias"
        return f"{self.dim}, eps={self.eps:g}, gain={self.gain}, cast={self.cast}{given}{bias}{scale}"


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
    takes = "bias"

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return super().forward(x)
        self.check_input(x)
        weight = self.weight if self.weight is None or self.gain == "w" else 1 + self.weight
        gain = None if weight is None else weight.to(x.dtype)
        y = F.layer_norm(x, (self.dim,), gain, self.bias.to(x.dtype), self.eps)
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


class CompressedRMSNorm(Norm):
    """RMSNorm of a row with one more element, which makes its sum zero, without that element.

    A LayerNorm's input without its mean needs one element less. Source: Jiang et al. 2023, "Pre-RMSNorm and
    Pre-CRMSNorm Transformers".
    """

    kind = "crms"

    def normalise(self, wide: Tensor) -> Tensor:
        total = wide.pow(2).sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).pow(2)
        return wide * torch.rsqrt(total / (self.dim + 1) + self.eps)


class GroupRMSNorm(Norm):
    """RMSNorm of each of `groups` equal parts of a row. Source: Dao & Gu 2024, "Mamba-2", with its groups of heads."""

    kind = "group"
    takes = "groups"

    def normalise(self, wide: Tensor) -> Tensor:
        parts = wide.unflatten(-1, (self.groups, -1))
        return (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)


class PowerNorm(Norm):
    """Divides each row by a power of its root mean square: from RMSNorm, power 1, to no norm at all, power 0."""

    kind = "power"
    takes = "power"

    def normalise(self, wide: Tensor) -> Tensor:
        return wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps) ** (-self.power / 2)


class FrozenNorm(Norm):
    """x times one learned number, which starts at 1: RMSNorm whose statistic has become a constant."""

    kind = "frozen"
    has_eps = False
    numbers: ClassVar = {"inverse_rms": 1.0}
    inverse_rms: nn.Parameter

    def normalise(self, wide: Tensor) -> Tensor:
        return wide * self.inverse_rms.to(wide.dtype)


class DynamicTanh(Norm):
    """tanh(α·x) with one learned α, which starts at 0.5. It computes no statistic and does not use eps.

    Source: Zhu et al. 2025, "Transformers without Normalization".
    """

    kind = "dyt"
    takes = "bias"
    has_eps = False
    numbers: ClassVar = {"alpha": 0.5}
    alpha: nn.Parameter

    def normalise(self, wide: Tensor) -> Tensor:
        return torch.tanh(self.alpha.to(wide.dtype) * wide)


class DynamicErf(DynamicTanh):
    """erf(α·x + s) with a learned α and shift s, which start at 0.5 and 0.

    Source: Chen et al. 2025, "Stronger Normalization-Free Transformers".
    """

    kind = "derf"
    numbers: ClassVar = {"alpha": 0.5, "shift": 0.0}
    shift: nn.Parameter

    def normalise(self, wide: Tensor) -> Tensor:
        return torch.erf(self.alpha.to(wide.dtype) * wide + self.shift.to(wide.dtype))


_ALL = (RMSNorm, LayerNorm, ScaleNorm, L2Norm, PartialRMSNorm, CompressedRMSNorm, GroupRMSNorm, PowerNorm, FrozenNorm)
NORMS: dict[str, type[Norm]] = {norm.kind: norm for norm in (*_ALL, DynamicTanh, DynamicErf)}
