"""How a checkpoint scales its rotary frequencies to reach beyond the context it was first trained on, as data.

The names are those of `rope_type` in config.json; the arithmetic is that of transformers, rounding included:

    linear    every frequency ÷ factor                                              (kaiokendev 2023)
    dynamic   a larger base, once the text is longer than the context               (NTK-aware, emozilla 2023)
    llama3    slow frequencies ÷ factor, fast ones kept, those between interpolated (LLaMA 3.1's released code)
    yarn      the same with a ramp over pairs, and cosines and sines scaled          (Peng et al. 2023)
    longrope  each frequency ÷ a number of its own: one list for short texts, one for long ones  (Ding et al. 2024)
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from llama_mini.errors import ConfigError
from llama_mini.validate import check_flag, check_number, check_whole, join_names, short_repr

_LARGEST = 10**12  # and 1 / _LARGEST the smallest setting, so that quotients and logarithms stay finite


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Base class of the rules below. Each raises a ConfigError that names the wrong field."""

    rope_type: ClassVar[str]

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """Scales the radians per position of each pair, (D/2,) float32; theta is their base (rope_theta)."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """The factor by which cosines and sines are multiplied."""
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self).items() if value is not None}
        return {"rope_type": self.rope_type} | settings

    @staticmethod
    def from_dict(data: Any) -> "RopeScaling":
        """The inverse of `to_dict`. Raises ConfigError for an unknown type, and for keys missing or unknown."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"rope_scaling must be an object, not {short_repr(data)}")
        settings = dict(data)
        name = settings.pop("rope_type", None)
        rule = next((rule for rule in RULES if rule.rope_type == name), None)
        if rule is None:
            known = ", ".join(["default", *(rule.rope_type for rule in RULES)])
            raise ConfigError(f"rope_scaling: unknown rope type {short_repr(name)}; known: {known}")
        known_fields = {f.name: f for f in fields(rule)}
        if unknown := [str(key) for key in settings if key not in known_fields]:
            raise ConfigError(f"rope_scaling of type {name}: unknown {join_names(sorted(unknown))}")
        required = [f.name for f in known_fields.values() if f.default is MISSING]
        if absent := [key for key in required if settings.get(key) is None]:
            raise ConfigError(f"rope_scaling of type {name}: {', '.join(absent)} missing")
        return rule(**settings)


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    rope_type: ClassVar[str] = "linear"
    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        return plain / self.factor


class LengthScaling(RopeScaling):
    """Base class of the rules whose frequencies depend on the length of the whole text.

    `model(tokens)` without a cache knows the length and follows it, as transformers does. With a cache the text may
    still grow, and cached keys keep the angles that they were written with. So there the length counts as
    `max_seq_len` from the first token on, as vLLM's `max_model_len` does, and no cache ever mixes two tables.
    """

    def for_length(self, frequencies: Tensor, length: Tensor, max_seq_len: int, theta: float) -> Tensor:
        """The (D/2,) frequencies of a text of `length` tokens; a tensor, so that nothing waits for the device."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(LengthScaling):
    """Scales nothing up to the model's `max_seq_len`, and increases the base with the length beyond it."""

    rope_type: ClassVar[str] = "dynamic"
    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        return plain

    def for_length(self, frequencies: Tensor, length: Tensor, max_seq_len: int, theta: float) -> Tensor:
        head_dim = 2 * len(frequencies)
        longer = torch.clamp(length, min=max_seq_len)
        growth = (self.factor * longer / max_seq_len) - (self.factor - 1)
        base = theta * growth ** (head_dim / (head_dim - 2))
        return 1.0 / base ** exponents(head_dim).to(base.device)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Wavelengths beyond `original_max_seq_len / low_freq_factor` are stretched by `factor`, those below
    `original_max_seq_len / high_freq_factor` are kept, and those between are interpolated."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_positive("low_freq_factor", self.low_freq_factor)
        _check_positive("high_freq_factor", self.high_freq_factor)
        _check_length(self.original_max_seq_len)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling.low_freq_factor must be below high_freq_factor, "
                f"not {self.low_freq_factor} and {self.high_freq_factor}"
            )

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        low, high, context = self.low_freq_factor, self.high_freq_factor, self.original_max_seq_len
        wavelengths = 2 * math.pi / plain
        smooth = (context / wavelengths - low) / (high - low)
        between = (1 - smooth) * plain / self.factor + smooth * plain
        scaled = torch.where(wavelengths > context / low, plain / self.factor, between)
        return torch.where(wavelengths < context / high, plain, scaled)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RopeScaling):
    """Pairs that turn more than `beta_fast` times within the original context are kept, those with fewer than
    `beta_slow` turns are stretched by `factor`, and a linear ramp lies between; `truncate` rounds its ends outwards to
    whole pairs. `attention_factor` scales cosines and sines; None: 0.1·ln(factor) + 1, as in the paper. `q_growth`: the
    query at position p is multiplied by 1 + q_growth·ln(1 + ⌊p / original_max_seq_len⌋) (llama_4_scaling_beta)."""

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_seq_len: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    q_growth: float = 0.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_length(self.original_max_seq_len)
        _check_positive("beta_fast", self.beta_fast)
        _check_positive("beta_slow", self.beta_slow)
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"rope_scaling.beta_fast must be at least beta_slow, not {self.beta_fast} and {self.beta_slow}"
            )
        if self.attention_factor is not None:
            _check_positive("attention_factor", self.attention_factor)
        check_flag("rope_scaling.truncate", self.truncate, ConfigError)
        check_number("rope_scaling.q_growth", self.q_growth, ConfigError, 0, _LARGEST)

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        dim = 2 * len(plain)
        if theta <= 1.0001:
            raise ConfigError(f"rope_theta must be above 1 for rope_scaling of type yarn, not {theta}")

        def pair_of(turns: float) -> float:
            return (dim * math.log(self.original_max_seq_len / (turns * 2 * math.pi))) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
        ramp = (pairs - low) / (high - low if high != low else 0.001)
        keep = 1 - ramp.clamp(0, 1)
        powers = theta ** exponents(dim)
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep

    @property
    def magnitude(self) -> float:
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor

    def q_factor(self, positions: Tensor) -> Tensor:
        return 1 + self.q_growth * torch.log1p(torch.floor(positions / self.original_max_seq_len))


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(LengthScaling):
    """`short_factor` divides the D/2 frequencies of texts up to `original_max_seq_len`, `long_factor` those of longer
    ones; `attention_factor` scales cosines and sines of both. A model with a `max_seq_len` beyond the original one
    uses `long_factor` whenever it has a cache."""

    rope_type: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_seq_len: int
    attention_factor: float

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if not isinstance(factors, list | tuple) or not factors:
                raise ConfigError(f"rope_scaling.{name} must be a list of numbers, not {short_repr(factors)}")
            for i, factor in enumerate(factors):
                _check_positive(f"{name}[{i}]", factor)
            object.__setattr__(self, name, tuple(factors))
        if (n := len(self.long_factor)) != len(self.short_factor):
            raise ConfigError(f"rope_scaling.short_factor has {len(self.short_factor)} numbers, but long_factor {n}")
        _check_length(self.original_max_seq_len)
        _check_positive("attention_factor", self.attention_factor)

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """Both tables, short and long: (2, D/2)."""
        factors = torch.tensor([self.short_factor, self.long_factor], dtype=torch.float32, device="cpu")
        return 1.0 / (factors * theta ** exponents(2 * len(plain)))

    def for_length(self, frequencies: Tensor, length: Tensor, max_seq_len: int, theta: float) -> Tensor:
        return torch.where(length > self.original_max_seq_len, frequencies[1], frequencies[0])

    @property
    def magnitude(self) -> float:
        return self.attention_factor


RULES: tuple[type[RopeScaling], ...] = (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling, LongRopeScaling)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scale of cosines and sines: 0.1·mscale·ln(factor) + 1 (Peng et al. 2023, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def exponents(head_dim: int) -> Tensor:
    """The exponent of each pair, whose frequency is base^-exponent: 0, 2/D, 4/D, ...: (D/2,) float32."""
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim


def _check_factor(value: Any) -> None:
    check_number("rope_scaling.factor", value, ConfigError, 1, _LARGEST)


def _check_positive(name: str, value: Any) -> None:
    check_number(f"rope_scaling.{name}", value, ConfigError, 1 / _LARGEST, _LARGEST)


def _check_length(value: Any) -> None:
    check_whole("rope_scaling.original_max_seq_len", value, ConfigError, 1, _LARGEST)
