"""LlamaConfig: the sizes and settings of a model. Frozen, keyword-only, validates itself."""

from dataclasses import dataclass
from typing import Any

from llama_mini.errors import ConfigError
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope_scaling import DynamicScaling, LongRopeScaling, RopeScaling
from llama_mini.validate import check_flag, check_number, check_whole, is_whole, short_repr

_LARGEST_SIZE = 2**31 - 1
_MAX_LAYERS = 10_000  # ten times the deepest models


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Everything that decides the shape and arithmetic of a model. checkpoint/hf/config.py translates config.json.

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
        rope_scaling: how the frequencies are scaled; None: not at all.
        sliding_window: the last positions that a token attends to, its own included (sliding_window); None: all.
        sliding_layers: indices of the layers with the window; None: every layer. Empty without a window.
        qkv_bias, o_bias, mlp_bias: whether q, k, v; the attention's output; gate, up and down have biases.
        tie_word_embeddings: whether the embedding is also the output head.
        norm_plan: a NormPlan or a preset's name; LLaMA is `pre`.
        bos_id, eos_ids, pad_id: special tokens of the checkpoint. The model itself does not use them.

    Raises:
        ConfigError: names the field, what was found and what is allowed.
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
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = None  # type: ignore[assignment]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    norm_plan: NormPlan = "pre"  # type: ignore[assignment]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        fill = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen)
        for name in ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "max_seq_len"):
            most = _MAX_LAYERS if name == "n_layers" else _LARGEST_SIZE
            check_whole(name, getattr(self, name), ConfigError, 1, most)
        if self.n_kv_heads is None:
            fill("n_kv_heads", self.n_heads)
        check_whole("n_kv_heads", self.n_kv_heads, ConfigError, 1, _LARGEST_SIZE)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ConfigError(f"dim ({self.dim}) is not a multiple of n_heads ({self.n_heads}); give head_dim")
            fill("head_dim", self.dim // self.n_heads)
        check_whole("head_dim", self.head_dim, ConfigError, 1, _LARGEST_SIZE)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, since rotary embedding rotates pairs; found {self.head_dim}")
        check_number("norm_eps", self.norm_eps, ConfigError, minimum=0)
        check_number("rope_theta", self.rope_theta, ConfigError, above=0)
        for name in ("norm_eps", "rope_theta"):  # JSON may hold an integer, and torch takes none beyond 64 bits
            fill(name, float(getattr(self, name)))
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ConfigError(f"rope_scaling must be a RopeScaling or None, not {short_repr(self.rope_scaling)}")
        if isinstance(self.rope_scaling, DynamicScaling) and self.head_dim < 4:
            raise ConfigError(f"rope_scaling of type dynamic needs a head_dim of at least 4, not {self.head_dim}")
        if isinstance(self.rope_scaling, LongRopeScaling):
            n, pairs = len(self.rope_scaling.short_factor), self.head_dim // 2
            if n != pairs:
                raise ConfigError(f"rope_scaling.short_factor has {n} numbers; a head_dim of {2 * pairs} needs {pairs}")
        self._check_window()
        for name in ("qkv_bias", "o_bias", "mlp_bias", "tie_word_embeddings"):
            check_flag(name, getattr(self, name), ConfigError)
        if isinstance(self.norm_plan, str):
            fill("norm_plan", NormPlan.parse(self.norm_plan, self.n_layers))
        if not isinstance(self.norm_plan, NormPlan):
            raise ConfigError(f"norm_plan must be a NormPlan or a preset's name, not {short_repr(self.norm_plan)}")
        self.norm_plan.check_depth(self.n_layers)
        if not isinstance(self.eos_ids, tuple) or not all(map(_is_id, self.eos_ids)):
            raise ConfigError(f"eos_ids must be a tuple of token ids, not {short_repr(self.eos_ids)}")
        for name in ("bos_id", "pad_id"):
            if getattr(self, name) is not None and not _is_id(getattr(self, name)):
                raise ConfigError(f"{name} must be a token id or None, not {short_repr(getattr(self, name))}")

    def _check_window(self) -> None:
        allowed = tuple(range(self.n_layers)) if self.sliding_window is not None else ()
        if self.sliding_layers is None:
            object.__setattr__(self, "sliding_layers", allowed)
        if self.sliding_window is not None:
            check_whole("sliding_window", self.sliding_window, ConfigError, 1, _LARGEST_SIZE)
        layers = self.sliding_layers
        if not isinstance(layers, tuple) or not all(map(is_whole, layers)) or not set(layers) <= set(allowed):
            where = f"from 0 to {self.n_layers - 1}" if allowed else "empty, since there is no sliding_window"
            raise ConfigError(f"sliding_layers must be a tuple of layer indices, {where}; found {short_repr(layers)}")


def _is_id(value: Any) -> bool:
    return is_whole(value) and 0 <= value <= _LARGEST_SIZE
