"""LlamaConfig: the sizes and settings of a model. Frozen, keyword-only, validates itself."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama_mini.errors import ConfigError
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope_scaling import DynamicScaling, LongRopeScaling, RopeScaling
from llama_mini.validate import check_choice, check_flag, check_number, check_whole, is_whole, short_repr

_LARGEST_SIZE = 2**31 - 1
_MAX_LAYERS = 10_000  # ten times the deepest models

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2"]  # feed_forward.py computes them
_OPTIONAL = ("sliding_rope_theta", "attention_scale", "attention_softcap", "logit_softcap")
_POSITIVE = ("rope_theta", "embedding_scale", "logit_scale", *_OPTIONAL)
_FLAGS = ("qkv_bias", "o_bias", "mlp_bias", "gated_mlp", "qk_norm_after_rope", "tie_word_embeddings")


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
        rotary_dim: the first elements of a head that are rotated, an even number; None: all (partial_rotary_factor).
        unrotated_layers: indices of the layers without rotary embedding (no_rope_layers).
        sliding_window: the last positions that a token attends to, its own included (sliding_window); None: all.
        sliding_layers: indices of the layers with the window; None: every layer. Empty without a window.
        sliding_rope_theta, sliding_rope_scaling: base and scaling of the layers with the window; a base of None gives
            them those of the others (Gemma 3, OLMo 3).
        attention_scale: the factor of q·k; None: head_dim^-½ (query_pre_attn_scalar, attention_multiplier).
        attention_softcap, logit_softcap: c replaces a score or a logit x by c·tanh(x / c); None: x stays.
        qk_norm_after_rope: whether q and k norms follow the rotation instead of preceding it (HunYuan).
        qkv_bias, o_bias, mlp_bias: whether q, k, v; the attention's output; gate, up and down have biases.
        activation: silu, gelu_tanh, gelu or relu2, the square of relu (hidden_act).
        gated_mlp: down(act(gate(x)) · up(x)), or without a gate down(act(up(x))).
        embedding_scale: factor of the embedding, rounded to the model's dtype as in Gemma.
        logit_scale: factor of the logits.
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
    rotary_dim: int = None  # type: ignore[assignment]
    unrotated_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = None  # type: ignore[assignment]
    sliding_rope_theta: float | None = None
    sliding_rope_scaling: RopeScaling | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    qk_norm_after_rope: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated_mlp: bool = True
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
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
        if self.rotary_dim is None:
            fill("rotary_dim", self.head_dim)
        check_whole("rotary_dim", self.rotary_dim, ConfigError, 1, self.head_dim)
        for name, width in (("head_dim", self.head_dim), ("rotary_dim", self.rotary_dim)):
            if width % 2:
                raise ConfigError(f"{name} must be even, since rotary embedding rotates pairs; found {width}")
        check_number("norm_eps", self.norm_eps, ConfigError, minimum=0)
        for name in _POSITIVE:
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_number(name, getattr(self, name), ConfigError, above=0)
        for name in ("norm_eps", *_POSITIVE):  # JSON may hold an integer, and torch takes none beyond 64 bits
            if getattr(self, name) is not None:
                fill(name, float(getattr(self, name)))
        self._check_rope("rope_scaling", self.rope_scaling)
        self._check_window()
        self._check_rope("sliding_rope_scaling", self.sliding_rope_scaling)
        self._check_layers("unrotated_layers", self.unrotated_layers, self.n_layers)
        check_choice("activation", self.activation, get_args(Activation), ConfigError)
        for name in _FLAGS:
            check_flag(name, getattr(self, name), ConfigError)
        if isinstance(self.norm_plan, str):
            fill("norm_plan", NormPlan.parse(self.norm_plan, self.n_layers))
        if not isinstance(self.norm_plan, NormPlan):
            raise ConfigError(f"norm_plan must be a NormPlan or a preset's name, not {short_repr(self.norm_plan)}")
        self.norm_plan.check_depth(self.n_layers)
        if not self.gated_mlp and any(self.norm_plan.layer(i)[1].gate is not None for i in range(self.n_layers)):
            raise ConfigError("norm plan: slot gate holds a norm, but gated_mlp is False: there is no gate to norm")
        if not isinstance(self.eos_ids, tuple) or not all(map(_is_id, self.eos_ids)):
            raise ConfigError(f"eos_ids must be a tuple of token ids, not {short_repr(self.eos_ids)}")
        for name in ("bos_id", "pad_id"):
            if getattr(self, name) is not None and not _is_id(getattr(self, name)):
                raise ConfigError(f"{name} must be a token id or None, not {short_repr(getattr(self, name))}")

    def _check_rope(self, name: str, scaling: Any) -> None:
        if scaling is not None and not isinstance(scaling, RopeScaling):
            raise ConfigError(f"{name} must be a RopeScaling or None, not {short_repr(scaling)}")
        if isinstance(scaling, DynamicScaling) and self.rotary_dim < 4:
            raise ConfigError(f"{name} of type dynamic needs a rotary_dim of at least 4, not {self.rotary_dim}")
        if isinstance(scaling, LongRopeScaling) and (n := len(scaling.short_factor)) != self.rotary_dim // 2:
            raise ConfigError(
                f"{name}.short_factor has {n} numbers; {self.rotary_dim} rotated elements need {self.rotary_dim // 2}"
            )

    def _check_window(self) -> None:
        n_windowed = self.n_layers if self.sliding_window is not None else 0
        if self.sliding_layers is None:
            object.__setattr__(self, "sliding_layers", tuple(range(n_windowed)))
        if self.sliding_window is not None:
            check_whole("sliding_window", self.sliding_window, ConfigError, 1, _LARGEST_SIZE)
        self._check_layers("sliding_layers", self.sliding_layers, n_windowed)
        if self.sliding_rope_theta is not None and not self.sliding_layers:
            raise ConfigError("sliding_rope_theta is given, but no layer has a sliding window")
        if self.sliding_rope_scaling is not None and self.sliding_rope_theta is None:
            raise ConfigError("sliding_rope_scaling needs a sliding_rope_theta, the base of the layers with the window")

    def _check_layers(self, name: str, layers: Any, n_layers: int) -> None:
        if not isinstance(layers, tuple) or not all(is_whole(i) and 0 <= i < n_layers for i in layers):
            where = f"from 0 to {n_layers - 1}" if n_layers else "empty, since there is no sliding_window"
            raise ConfigError(f"{name} must be a tuple of layer indices, {where}; found {short_repr(layers)}")


def _is_id(value: Any) -> bool:
    return is_whole(value) and 0 <= value <= _LARGEST_SIZE
