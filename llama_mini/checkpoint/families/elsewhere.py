"""The families whose norms sit elsewhere or are of another kind: OLMo, EXAONE, GLM-4 and others.

Source of the defaults and of what each key means: the configuration and modeling files of transformers 5.23.
"""

from llama_mini.checkpoint import keys
from llama_mini.checkpoint.families.family import (
    ATTENTION_BIAS,
    BIASES,
    LATE,
    MUP,
    NO_GATE,
    QKV_BIAS,
    TIED,
    USE_BIAS,
    Family,
    defaults,
    norms,
)
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec

_BIASED = NormSpec(kind="layer", cast="late", bias=True)
_LAYER = NormSpec(kind="layer", cast="late")
_COHERE = NormPlan(attention=BranchPlan(pre=_LAYER), final=_LAYER, parallel=True)

ELSEWHERE = (
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        keys=keys.OLMO2_KEYS,
        norms=norms("out", LATE, qk="full"),
        settings=ATTENTION_BIAS,
        defaults=defaults(1e-5, 2048),
    ),
    Family(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        keys=keys.OLMO2_KEYS,
        norms=norms("out", LATE, qk="full"),
        settings=ATTENTION_BIAS,
        theta=500_000.0,
        two_ropes=True,
        window="listed",
        pattern=(4, 3),
        defaults=defaults(1e-5, 2048, sliding_window=4096),
    ),
    Family(
        model_type="exaone4",
        architecture="Exaone4ForCausalLM",
        keys=keys.OLMO2_KEYS,
        norms=norms("out", qk="head"),
        window="listed",
        pattern=(4, 3),
        unrotated="full_beside_sliding",
        defaults=defaults(1e-5, 2048, 32, sliding_window=4096),
    ),
    Family(
        model_type="hyperclovax",
        architecture="HyperCLOVAXForCausalLM",
        keys=keys.HYPERCLOVAX_KEYS,
        norms=norms("pre out"),
        settings={**BIASES, **MUP, "logits_scaling": "logit_scale"},
        constants={"use_post_norm": (True,)},
        defaults=defaults(1e-6, 2048),
    ),
    Family(
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        keys=keys.GLM4_KEYS,
        norms=norms("pre out"),
        settings=QKV_BIAS,
        interleaved=True,
        partial=0.5,
        defaults=defaults(1.5625e-7, 131_072, 2, head_dim=128, attention_bias=True),
    ),
    Family(
        model_type="olmo",
        architecture="OlmoForCausalLM",
        norms=norms("pre", NormSpec(kind="layer", gain="none")),
        settings=ATTENTION_BIAS,
        eps=None,
        defaults=defaults(1e-5, 2048),
    ),
    Family(
        model_type="nemotron",
        architecture="NemotronForCausalLM",
        norms=norms("pre", NormSpec(kind="layer", gain="1+w", bias=True, cast="late")),
        settings=BIASES,
        fixed=NO_GATE,
        eps="norm_eps",
        partial=0.5,
        defaults=defaults(1e-5, 4096, hidden_act="relu2"),
    ),
    Family(
        model_type="jais2",
        architecture="Jais2ForCausalLM",
        norms=norms("pre", _BIASED),
        settings=BIASES,
        fixed=NO_GATE,
        eps="layer_norm_eps",
        defaults=defaults(1e-5, 8192, hidden_act="relu2", attention_bias=True, mlp_bias=True),
    ),
    Family(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        norms=norms("pre", _BIASED),
        settings={"use_qkv_bias": "qkv_bias", "use_parallel_residual": "parallel"},
        eps="layer_norm_eps",
        partial=0.25,
        defaults=defaults(1e-5, 4096, 32),
    ),
    Family(
        model_type="starcoder2",
        architecture="Starcoder2ForCausalLM",
        keys=keys.STARCODER2_KEYS,
        norms=norms("pre", _BIASED),
        settings=USE_BIAS,
        fixed=NO_GATE,
        constants={"norm_type": ("layer_norm",), "mlp_type": ("default",)},
        eps="norm_epsilon",
        window="every",
        defaults=defaults(1e-5, 4096, 2, hidden_act="gelu_pytorch_tanh", use_bias=True, **TIED),
    ),
    Family(
        model_type="cohere",
        architecture="CohereForCausalLM",
        norms=_COHERE,
        settings={**ATTENTION_BIAS, "logit_scale": "logit_scale"},
        eps="layer_norm_eps",
        interleaved=True,
        theta=500_000.0,
        defaults=defaults(1e-5, 8192, logit_scale=0.0625, **TIED),
    ),
    Family(
        model_type="cohere2",
        architecture="Cohere2ForCausalLM",
        norms=_COHERE,
        settings={**ATTENTION_BIAS, "logit_scale": "logit_scale"},
        eps="layer_norm_eps",
        interleaved=True,
        window="listed",
        pattern=(4, 3),
        unrotated="full",
        defaults=defaults(1e-5, 8192, logit_scale=0.0625, sliding_window=4096, **TIED),
    ),
)
