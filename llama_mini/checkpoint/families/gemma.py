"""The families of Gemma: gains of 1 + w, a scaled embedding, and from Gemma 2 on norms on both sides of a branch.

Source of the defaults and of what each key means: the configuration and modeling files of transformers 5.23.
"""

from dataclasses import replace

from llama_mini.checkpoint import keys
from llama_mini.checkpoint.families.family import ATTENTION_BIAS, TIED, Family, Settings, defaults, norms
from llama_mini.model.norm_slots import NormSpec

_NORM = NormSpec(gain="1+w", cast="late")
_SETTINGS: Settings = {
    **ATTENTION_BIAS,
    "query_pre_attn_scalar": ("attention_scale", -0.5),
    "final_logit_softcapping": "logit_softcap",
}
_GEMMA2_SETTINGS: Settings = {**_SETTINGS, "attn_logit_softcapping": "attention_softcap"}
_SIZES = defaults(1e-6, 8192, 4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, **TIED)
_DEFAULTS = {**_SIZES, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
_GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    modules=keys.GEMMA_NORMS | keys.OUT_NORMS,
    norms=norms("pre out", _NORM),
    settings=_GEMMA2_SETTINGS,
    activation="hidden_activation",
    constants={"hidden_act": ("gelu_pytorch_tanh",)},  # transformers does not read it
    scaled_embedding=True,
    window="listed",
    pattern=(2, 1),
    defaults=_DEFAULTS,
)

GEMMAS = (
    Family(
        "gemma",
        "GemmaForCausalLM",
        norms=norms("pre", _NORM),
        settings=ATTENTION_BIAS,
        # "gelu" means gelu_pytorch_tanh here: transformers' GemmaConfig
        constants={"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh",)},
        fixed={"activation": "gelu_tanh"},
        activation=None,
        scaled_embedding=True,
        defaults=defaults(1e-6, 8192, 16, head_dim=256, **TIED),
    ),
    _GEMMA2,
    replace(
        _GEMMA2,
        model_type="vaultgemma",
        architecture="VaultGemmaForCausalLM",
        modules=keys.GEMMA_NORMS,
        norms=norms("pre", _NORM),
    ),
    replace(
        _GEMMA2,
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        modules=keys.GEMMA_NORMS | keys.OUT_NORMS | keys.QK_NORMS,
        norms=norms("pre out", _NORM, qk="head"),
        settings=_SETTINGS,
        theta=1_000_000.0,
        two_ropes=True,
        sliding_theta=10_000.0,
        pattern=(6, 5),
        sizes=(2304, 9216, 26, 8, 262_208),
        defaults={**_DEFAULTS, "max_position_embeddings": 131_072, "final_logit_softcapping": None},
    ),
)
