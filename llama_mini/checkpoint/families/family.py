"""What a Hugging Face family is, as data: the names of its tensors, and what the keys of its config.json mean."""

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from llama_mini.checkpoint.keys import PRE_NORMS, KeyTable, hugging_face_keys
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec, View
from llama_mini.model.rope_scaling import RULES

ROPE_TYPES = ("default", *(rule.rope_type for rule in RULES))
# The keys of config.json that only some families read -> the fields of LlamaConfig that they set, or (field, p) where
# the field is the value to the power of p. `beta` and `parallel` are not fields but parts of the norm plan.
SETTINGS: Mapping[str, str | tuple[str, float]] = {
    "attention_bias": "qkv_bias o_bias",
    "attention_out_bias": "o_bias",
    "mlp_bias": "mlp_bias",
    "use_bias": "qkv_bias o_bias mlp_bias",
    "use_qkv_bias": "qkv_bias",
    "qkv_bias": "qkv_bias o_bias",
    "bias": "mlp_bias",
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention_scale",
    "residual_multiplier": "beta",
    "logits_scaling": ("logit_scale", -1),
    "logit_scale": "logit_scale",
    "query_pre_attn_scalar": ("attention_scale", -0.5),
    "final_logit_softcapping": "logit_softcap",
    "attn_logit_softcapping": "attention_softcap",
    "use_parallel_residual": "parallel",
    "shared_intermediate_size": "hidden_dim",
}
MUP = "embedding_multiplier attention_multiplier residual_multiplier"  # maximal update parametrisation


def norms(slots: str, spec: NormSpec = NormSpec(), qk: View | None = None) -> NormPlan:  # noqa: B008  (frozen)
    """A plan with `spec` in the slots of both branches, before the head, and with `qk` on q and k."""
    specs: dict[str, Any] = dict.fromkeys(slots.split(), spec)
    branch = BranchPlan(**specs)
    heads = replace(spec, view=qk) if qk else None
    return NormPlan(attention=replace(branch, q=heads, k=heads), feed_forward=branch, final=spec)


def defaults(eps: float, context: int, n_kv_heads: int | None = None, **others: Any) -> dict[str, Any]:
    """The values of absent keys. `eps` stands for the family's own key."""
    heads = {} if n_kv_heads is None else {"num_key_value_heads": n_kv_heads}
    return {"eps": eps, "max_position_embeddings": context, **heads, **others}


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    modules: of a layer in its files, theirs -> ours, beside the usual projections or in their place.
    norms: its plan; what `reads` names may change residual scales.
    reads: keys of SETTINGS, as KEY=FIELD where a key sets another field in this family.
    fixed: the fields of LlamaConfig that its config.json does not state.
    constants: keys that have one meaning here, with the values that state it; the first is written.
    defaults: the values of absent keys.
    sizes: those of absent keys in the text_config of a larger model: hidden_size, intermediate_size, layers, heads,
        vocab_size. Published ones leave out what equals transformers' default.
    eps, activation: the keys of the norms' eps (None: 1e-5) and of the activation (None: `fixed` has it).
    interleaved: rotary pairs lie side by side in its files.
    theta: the base of the rotary frequencies, where config.json states none.
    partial: the share of a head that is rotated, where config.json states none. None: always all.
    rope_types: those that it has.
    growing_queries: queries grow with their position by `llama_4_scaling_beta` (YarnScaling's q_growth).
    two_ropes: the layers with a window have a base and a scaling of their own.
    sliding_theta: their base, where config.json states none; None: that of the other layers.
    fixed_alpha: "dynamic" scaling with a key `alpha` stretches the base once, whatever the length.
    scaled_embedding: the embedding is multiplied by √hidden_size.
    window: the layers with a sliding window: none, every one, those that `layer_types` lists, or listed ones, if
        `use_sliding_window` is true.
    pattern: (p, i): without `layer_types`, layer i and every p-th layer from there on have no window.
    unrotated: the layers without rotary embedding: none, those without a window, these only if others have one, those
        with a 0 in `no_rope_layers`, or all unless `position_embedding_type` is "rope".
    """

    model_type: str
    architecture: str
    _: KW_ONLY
    modules: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    norms: NormPlan = norms("pre")  # noqa: RUF009
    reads: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int, int, int, int] | None = None
    eps: str | None = "rms_norm_eps"
    activation: str | None = "hidden_act"
    interleaved: bool = False
    theta: float = 10_000.0
    partial: float | None = None
    rope_types: Collection[str] = ROPE_TYPES
    growing_queries: bool = False
    two_ropes: bool = False
    sliding_theta: float | None = None
    fixed_alpha: bool = False
    scaled_embedding: bool = False
    window: Literal["none", "every", "listed", "switched"] = "none"
    pattern: tuple[int, int] | None = None
    unrotated: Literal["none", "full", "full_beside_sliding", "listed", "stated"] = "none"

    @cached_property
    def keys(self) -> KeyTable:
        """The names of its tensors -> ours."""
        return hugging_face_keys(self.modules)

    @cached_property
    def settings(self) -> Mapping[str, str | tuple[str, float]]:
        """What it reads -> the fields, as in SETTINGS."""
        stated = (key.partition("=") for key in self.reads.split())
        return {key: other or SETTINGS[key] for key, _, other in stated}
