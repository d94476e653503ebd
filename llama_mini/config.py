"""LlamaConfig: the sizes and settings of a model. Frozen, keyword-only, validates itself."""

from dataclasses import dataclass
from typing import Any

from llama_mini.checks import is_finite, is_whole, shown
from llama_mini.errors import ConfigError
from llama_mini.norm_plan import NormPlan

_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """LLaMA 3.1's stretching of the rotary frequencies (`rope_type: llama3` in a config.json).

    Wavelengths beyond `original_max_seq_len / low_freq_factor` are stretched by `factor`, those below
    `original_max_seq_len / high_freq_factor` stay, and between the two it is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _check_positive(f"rope_scaling.{name}", getattr(self, name))
        _check_size("rope_scaling.original_max_seq_len", self.original_max_seq_len)
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor must be at least 1, not {self.factor}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling.low_freq_factor must be below high_freq_factor, "
                f"not {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that decides the shape and arithmetic of a model; Hugging Face's words are in checkpoint/hf_config.py.

    Args:
        dim: width of the residual stream (hidden_size).
        n_layers: number of layers (num_hidden_layers).
        n_heads: query heads (num_attention_heads).
        n_kv_heads: key and value heads (num_key_value_heads); None: as many as query heads. Divides `n_heads`.
        head_dim: width of a head, even; None: dim / n_heads.
        hidden_dim: width of the feed-forward layer (intermediate_size).
        vocab_size: rows of the embedding.
        max_seq_len: the longest context in tokens (max_position_embeddings).
        norm_eps: eps of every norm whose NormSpec does not set its own (rms_norm_eps).
        rope_theta: base of the rotary frequencies.
        rope_scaling: their scaling; None: none.
        tie_word_embeddings: the output head is the embedding.
        norm_plan: a NormPlan or a preset's name; LLaMA is `pre`.
        bos_id, eos_ids, pad_id: special tokens as the checkpoint states them. The model does not read them.

    Raises:
        ConfigError: names the field, what was found and what is possible.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = None  # type: ignore[assignment]  # __post_init__ fills it in
    head_dim: int = None  # type: ignore[assignment]
    hidden_dim: int
    vocab_size: int
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    norm_plan: NormPlan = "pre"  # type: ignore[assignment]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        fill = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen)
        for name in ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "max_seq_len"):
            _check_size(name, getattr(self, name))
        if self.n_kv_heads is None:
            fill("n_kv_heads", self.n_heads)
        _check_size("n_kv_heads", self.n_kv_heads)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ConfigError(f"dim ({self.dim}) is not a multiple of n_heads ({self.n_heads}); give head_dim")
            fill("head_dim", self.dim // self.n_heads)
        _check_size("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, since rotary embedding turns pairs; found {self.head_dim}")
        if not is_finite(self.norm_eps) or self.norm_eps < 0:
            raise ConfigError(f"norm_eps must be a finite number of at least 0, not {shown(self.norm_eps)}")
        _check_positive("rope_theta", self.rope_theta)
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ConfigError(f"rope_scaling must be a RopeScaling or None, not {shown(self.rope_scaling)}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings must be true or false, not {shown(self.tie_word_embeddings)}")
        if isinstance(self.norm_plan, str):
            fill("norm_plan", NormPlan.parse(self.norm_plan, self.n_layers))
        if not isinstance(self.norm_plan, NormPlan):
            raise ConfigError(f"norm_plan must be a NormPlan or a preset's name, not {shown(self.norm_plan)}")
        self.norm_plan.check_depth(self.n_layers)
        if not isinstance(self.eos_ids, tuple) or not all(map(_is_id, self.eos_ids)):
            raise ConfigError(f"eos_ids must be a tuple of token ids, not {shown(self.eos_ids)}")
        for name in ("bos_id", "pad_id"):
            if getattr(self, name) is not None and not _is_id(getattr(self, name)):
                raise ConfigError(f"{name} must be a token id or None, not {shown(getattr(self, name))}")


def _is_id(value: Any) -> bool:
    return is_whole(value) and 0 <= value <= _LARGEST_SIZE


def _check_size(name: str, value: Any) -> None:
    if not is_whole(value) or not 1 <= value <= _LARGEST_SIZE:
        raise ConfigError(f"{name} must be a whole number from 1 to {_LARGEST_SIZE}, not {shown(value)}")


def _check_positive(name: str, value: Any) -> None:
    if not is_finite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, not {shown(value)}")
