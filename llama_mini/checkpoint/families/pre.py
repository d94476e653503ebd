"""The families with LLaMA's placement: a norm before each branch. Gemma's is in elsewhere.py.

Source of the defaults and of what each key means: the configuration and modeling files of transformers 5.23.
"""

from llama_mini.checkpoint import keys
from llama_mini.checkpoint.families.family import MUP, Family, defaults, norms
from llama_mini.model.norm_slots import NormSpec

_FACTOR_16 = {"rope_theta": 1_000_000.0, "factor": 16.0}
GLM = Family(
    "glm",
    "GlmForCausalLM",
    modules=keys.PRE_NORMS | keys.GATE_UP,
    reads="attention_bias=qkv_bias",
    interleaved=True,
    partial=0.5,
    defaults=defaults(1.5625e-7, 131_072, 2, head_dim=128, attention_bias=True),
)

PRE = (
    Family(
        "llama",
        "LlamaForCausalLM",
        reads="attention_bias mlp_bias",
        sizes=(4096, 11_008, 32, 32, 32_000),
        defaults=defaults(1e-6, 2048),
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        window="every",
        sizes=(4096, 14_336, 32, 32, 32_000),
        defaults=defaults(1e-6, 131_072, 8, sliding_window=4096),
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        constants={"attention_bias": (True, False)},  # ignored, as in transformers
        fixed={"qkv_bias": True},
        window="switched",
        sizes=(4096, 22_016, 32, 32, 151_936),
        defaults=defaults(1e-6, 32_768, 32, sliding_window=4096, max_window_layers=28),
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        modules=keys.PRE_NORMS | keys.QK_NORMS,
        norms=norms("pre", qk="head"),
        reads="attention_bias",
        window="switched",
        defaults=defaults(1e-6, 32_768, 32, head_dim=128, sliding_window=4096, max_window_layers=28),
    ),
    Family(
        "ministral", "MinistralForCausalLM", window="listed", defaults=defaults(1e-6, 131_072, 8, sliding_window=4096)
    ),
    Family(
        "ministral3",
        "Ministral3ForCausalLM",
        window="every",
        rope_types=("yarn",),
        growing_queries=True,
        defaults=defaults(
            1e-5,
            262_144,
            8,
            head_dim=128,
            rope_parameters=_FACTOR_16
            | {"rope_type": "yarn", "original_max_position_embeddings": 16_384}
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        ),
    ),
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        reads="attention_bias=qkv_bias attention_out_bias mlp_bias",
        defaults=defaults(1e-6, 524_288, 8, head_dim=128, attention_bias=True),
    ),
    Family(
        "cwm",
        "CwmForCausalLM",
        window="listed",
        pattern=(4, 0),
        theta=1_000_000.0,
        defaults=defaults(
            1e-5,
            131_072,
            8,
            head_dim=128,
            sliding_window=8192,
            rope_parameters=_FACTOR_16
            | {"rope_type": "llama3", "original_max_position_embeddings": 8192}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
    ),
    Family(
        "internlm3",
        "InternLM3ForCausalLM",
        reads="attention_bias mlp_bias qkv_bias bias",
        defaults=defaults(1e-5, 32_768, 2, head_dim=128),
    ),
    Family(
        "iquestcoder",
        "IQuestCoderForCausalLM",
        reads="attention_bias mlp_bias",
        defaults=defaults(1e-5, 131_072, 8, head_dim=128),
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        reads="attention_bias mlp_bias",
        theta=2_000_000.0,
        window="switched",
        unrotated="listed",
        defaults=defaults(1e-6, 32_768, 4, no_rope_layer_interval=4, tie_word_embeddings=True),
    ),
    Family(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        reads="use_bias",
        interleaved=True,
        theta=500_000.0,
        defaults=defaults(1e-5, 131_072, 2, head_dim=128, tie_word_embeddings=True),
    ),
    Family(
        "helium",
        "HeliumForCausalLM",
        norms=norms("pre", NormSpec(cast="late")),
        reads="attention_bias=qkv_bias mlp_bias",
        interleaved=True,
        theta=100_000.0,
        defaults=defaults(1e-8, 4096, 20, head_dim=128),
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        modules=keys.PRE_NORMS | keys.QKV | keys.GATE_UP,
        rope_types=("default", "longrope"),
        window="every",
        partial=1.0,
        defaults=defaults(1e-5, 4096),
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        reads=f"attention_bias mlp_bias {MUP} logits_scaling",
        defaults=defaults(1e-6, 2048, attention_multiplier=1.0),
    ),
    Family(  # Granite 4 without state spaces and experts
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        modules=keys.PRE_NORMS
        | {f"shared_mlp.input_linear[{part}]": f"feed_forward.{part}_proj" for part in ("gate", "up")}
        | {"shared_mlp.output_linear": "feed_forward.down_proj"},
        reads=f"attention_bias {MUP} logits_scaling shared_intermediate_size",
        constants={"num_local_experts": (0,), "normalization_function": ("rmsnorm",)},
        unrotated="stated",
        defaults=defaults(
            1e-6, 2048, attention_multiplier=1.0, shared_intermediate_size=1024, intermediate_size=11_008
        ),
    ),
    GLM,
    Family(
        "arcee",
        "ArceeForCausalLM",
        reads="attention_bias mlp_bias",
        fixed={"gated_mlp": False},
        defaults=defaults(1e-5, 4096, hidden_act="relu2"),
    ),
    Family(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        modules=keys.PRE_NORMS
        | {f"self_attn.{name}_layernorm": f"attention.{name[0]}_norm" for name in ("query", "key")},
        norms=norms("pre", qk="head"),
        reads="attention_bias",
        fixed={"qk_norm_after_rope": True},
        constants={"use_qk_norm": (True,), "norm_type": ("rms",), "use_cla": (False,)},  # vLLM reads these
        fixed_alpha=True,
        defaults=defaults(1e-5, 2048),
    ),
)
