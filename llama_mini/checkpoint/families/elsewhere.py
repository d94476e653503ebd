"""The families whose norms sit elsewhere or are of another kind: OLMo, EXAONE, GLM-4, Gemma and others.

Source of the defaults and of what each key means: the configuration and modeling files of transformers 5.23.
"""

from dataclasses import replace

from llama_mini.checkpoint import keys
from llama_mini.checkpoint.families.family import MUP, Family, defaults, norms
from llama_mini.checkpoint.families.pre import GLM
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec

_GLM4_NORMS = {"post_self_attn_layernorm": "attention.out_norm", "post_mlp_layernorm": "feed_forward.out_norm"}
_BIASED = NormSpec(kind="layer", cast="late", bias=True)
_LAYER = NormSpec(kind="layer", cast="late")
_LATE = NormSpec(cast="late")
_COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    norms=NormPlan(attention=BranchPlan(pre=_LAYER), final=_LAYER, parallel=True),
    reads="attention_bias logit_scale",
    eps="layer_norm_eps",
    interleaved=True,
    theta=500_000.0,
    defaults=defaults(1e-5, 8192, logit_scale=0.0625, tie_word_embeddings=True),
)
_GEMMA_NORM = NormSpec(gain="1+w", cast="late")  # and norms on both sides of a branch from Gemma 2 on
_GEMMA3_READS = "attention_bias query_pre_attn_scalar final_logit_softcapping"
_GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    modules=keys.GEMMA_NORMS | keys.OUT_NORMS,
    norms=norms("pre out", _GEMMA_NORM),
    reads=f"{_GEMMA3_READS} attn_logit_softcapping",
    activation="hidden_activation",
    constants={"hidden_act": ("gelu_pytorch_tanh",)},  # transformers does not read it
    scaled_embedding=True,
    window="listed",
    pattern=(2, 1),
    defaults={
        **defaults(
            1e-6, 8192, 4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, tie_word_embeddings=True
        ),
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
)

ELSEWHERE = (
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        modules=keys.OUT_NORMS | keys.QK_NORMS,
        norms=norms("out", _LATE, qk="full"),
        reads="attention_bias",
        defaults=defaults(1e-5, 2048),
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        modules=keys.OUT_NORMS | keys.QK_NORMS,
        norms=norms("out", _LATE, qk="full"),
        reads="attention_bias",
        theta=500_000.0,
        two_ropes=True,
        window="listed",
        pattern=(4, 3),
        defaults=defaults(1e-5, 2048, sliding_window=4096),
    ),
    Family(
        "exaone4",
        "Exaone4ForCausalLM",
        modules=keys.OUT_NORMS | keys.QK_NORMS,
        norms=norms("out", qk="head"),
        window="listed",
        pattern=(4, 3),
        unrotated="full_beside_sliding",
        defaults=defaults(1e-5, 2048, 32, sliding_window=4096),
    ),
    Family(
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        modules=keys.PRE_NORMS | {"post_norm1": "attention.out_norm", "post_norm2": "feed_forward.out_norm"},
        norms=norms("pre out"),
        reads=f"attention_bias mlp_bias {MUP} logits_scaling=logit_scale",
        constants={"use_post_norm": (True,)},
        defaults=defaults(1e-6, 2048),
    ),
    replace(
        GLM,
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        modules={**GLM.modules, **_GLM4_NORMS},
        norms=norms("pre out"),
    ),
    Family(
        "olmo",
        "OlmoForCausalLM",
        norms=norms("pre", NormSpec(kind="layer", gain="none")),
        reads="attention_bias",
        eps=None,
        defaults=defaults(1e-5, 2048),
    ),
    Family(
        "nemotron",
        "NemotronForCausalLM",
        norms=norms("pre", NormSpec(kind="layer", gain="1+w", bias=True, cast="late")),
        reads="attention_bias mlp_bias",
        fixed={"gated_mlp": False},
        eps="norm_eps",
        partial=0.5,
        defaults=defaults(1e-5, 4096, hidden_act="relu2"),
    ),
    Family(
        "jais2",
        "Jais2ForCausalLM",
        norms=norms("pre", _BIASED),
        reads="attention_bias mlp_bias",
        fixed={"gated_mlp": False},
        eps="layer_norm_eps",
        defaults=defaults(1e-5, 8192, hidden_act="relu2", attention_bias=True, mlp_bias=True),
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        norms=norms("pre", _BIASED),
        reads="use_qkv_bias use_parallel_residual",
        eps="layer_norm_eps",
        partial=0.25,
        defaults=defaults(1e-5, 4096, 32),
    ),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        modules=keys.PRE_NORMS | {"mlp.c_fc": "feed_forward.up_proj", "mlp.c_proj": "feed_forward.down_proj"},
        norms=norms("pre", _BIASED),
        reads="use_bias",
        fixed={"gated_mlp": False},
        constants={"norm_type": ("layer_norm",), "mlp_type": ("default",)},
        eps="norm_epsilon",
        window="every",
        defaults=defaults(1e-5, 4096, 2, hidden_act="gelu_pytorch_tanh", use_bias=True, tie_word_embeddings=True),
    ),
    _COHERE,
    replace(
        _COHERE,
        model_type="cohere2",
        architecture="Cohere2ForCausalLM",
        theta=10_000.0,
        window="listed",
        pattern=(4, 3),
        unrotated="full",
        defaults={**_COHERE.defaults, "sliding_window": 4096},
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        norms=norms("pre", _GEMMA_NORM),
        reads="attention_bias",
        # "gelu" means gelu_pytorch_tanh here: transformers' GemmaConfig
        constants={"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh",)},
        fixed={"activation": "gelu_tanh"},
        activation=None,
        scaled_embedding=True,
        defaults=defaults(1e-6, 8192, 16, head_dim=256, tie_word_embeddings=True),
    ),
    _GEMMA2,
    replace(
        _GEMMA2,
        model_type="vaultgemma",
        architecture="VaultGemmaForCausalLM",
        modules=keys.GEMMA_NORMS,
        norms=norms("pre", _GEMMA_NORM),
    ),
    replace(
        _GEMMA2,
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        modules=keys.GEMMA_NORMS | keys.OUT_NORMS | keys.QK_NORMS,
        norms=norms("pre out", _GEMMA_NORM, qk="head"),
        reads=_GEMMA3_READS,
        theta=1_000_000.0,
        two_ropes=True,
        sliding_theta=10_000.0,
        pattern=(6, 5),
        sizes=(2304, 9216, 26, 8, 262_208),
        defaults={**_GEMMA2.defaults, "max_position_embeddings": 131_072, "final_logit_softcapping": None},
    ),
)
