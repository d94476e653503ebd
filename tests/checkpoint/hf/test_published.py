"""config.json of families as published: the same as transformers reads it, and every absent key has its default."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.checkpoint.hf.config import from_hf, to_hf
from llama_mini.errors import ConfigError, LlamaMiniWarning
from tests.tiny_models import HF_TINY

SIZES = {"hidden_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 160, "intermediate_size": 48}
SIZES |= {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ALL_ATTENTION = {"layer_types": ["attention"] * 12, "num_local_experts": 0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1}
HUNYUAN = {"type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0}
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 10.0],
}
PUBLISHED: list[dict[str, Any]] = [  # the keys of v4, with smaller sizes
    {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "head_dim": 16},
    {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    | {
        "query_pre_attn_scalar": 144,
        "attn_logit_softcapping": 50.0,
        "sliding_window": 4096,
        "cache_implementation": "hybrid",
    },
    {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None},
    {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 10_000, "sliding_window_pattern": 6}
    | {"sliding_window": 1024, "rope_scaling": LINEAR, "attn_logit_softcapping": None},
    {"model_type": "olmo3", "rope_theta": 500_000, "rope_scaling": YARN | {"original_max_position_embeddings": 512}}
    | {"max_position_embeddings": 4096, "layer_types": ["sliding_attention", "full_attention"] * 6},
    {"model_type": "exaone4", "sliding_window": 4096, "sliding_window_pattern": 4, "head_dim": 16, "rope_theta": 1e6},
    {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 12},
    {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0] * 3, "no_rope_layer_interval": 4, "rope_theta": 5e6},
    {"model_type": "phi3", "rope_scaling": LONG, "original_max_position_embeddings": 4096, "embd_pdrop": 0.0}
    | {
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 131_072,
        "sliding_window": 262_144,
        "resid_pdrop": 0.0,
    },
    {"model_type": "hunyuan_v1_dense", "rope_scaling": HUNYUAN, "rope_theta": 10_000.0, "head_dim": 16}
    | {"use_qk_norm": True, "norm_type": "rms", "use_cla": False},
    {"model_type": "cohere2", "sliding_window_pattern": 4, "logit_scale": 0.25, "rope_theta": 50_000.0},
    {"model_type": "glm4", "partial_rotary_factor": 0.5, "attention_bias": False, "head_dim": 16},
    {"model_type": "stablelm", "partial_rotary_factor": 0.25, "use_qkv_bias": True, "hidden_dropout": 0.0},
    {"model_type": "nemotron", "partial_rotary_factor": 0.5, "norm_eps": 1e-5, "hidden_act": "relu2"},
    {"model_type": "granite", "logits_scaling": 13, "attention_multiplier": 0.015625, "residual_multiplier": 0.22}
    | {"embedding_multiplier": 12},
    {"model_type": "granitemoehybrid", "shared_intermediate_size": 64, "position_embedding_type": "rope"}
    | {"normalization_function": "rmsnorm", "mamba_d_state": 128, "mamba_d_head": "auto", "logits_scaling": 10},
    {"model_type": "starcoder2", "norm_type": "layer_norm", "mlp_type": "default", "norm_epsilon": 1e-5},
    {
        "model_type": "internlm3",
        "qkv_bias": True,
        "bias": True,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
]


def published(raw: dict[str, Any]) -> dict[str, Any]:
    eps = FAMILIES[raw["model_type"]].eps
    raw = ALL_ATTENTION | raw if raw["model_type"] == "granitemoehybrid" else raw
    return SIZES | ({} if eps is None else {eps: 1e-5}) | raw


@pytest.mark.parametrize("raw", [published(raw) for raw in PUBLISHED], ids=lambda raw: raw["model_type"])
def test_published_keys_mean_what_transformers_makes_of_them(raw: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    config = from_hf(raw)
    assert config == from_hf(json.loads(theirs.to_json_string()))  # its own spelling, that of v5
    again = to_hf(config, "float32", raw["model_type"])
    assert again["model_type"] == raw["model_type"]
    assert config == from_hf(json.loads(AutoConfig.for_model(**json.loads(json.dumps(again))).to_json_string()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    raw = published(
        {"model_type": model_type} | ({"head_dim": 16} if "head_dim" in FAMILIES[model_type].defaults else {})
    )
    theirs = AutoConfig.for_model(**raw)
    assert from_hf(raw) == from_hf(json.loads(theirs.to_json_string()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_eps_and_head_width_are_those_of_transformers(model_type: str) -> None:
    raw = SIZES | {"model_type": model_type} | (ALL_ATTENTION if model_type == "granitemoehybrid" else {})
    theirs: Any = AutoConfig.for_model(**raw)
    if (eps := FAMILIES[model_type].eps) is None:
        assert from_hf(raw).norm_eps == 1e-5
        return
    with pytest.warns(LlamaMiniWarning, match=f"{eps} is absent; "):
        config = from_hf(raw)
    assert config.norm_eps == getattr(theirs, eps)
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 16)


CODE = {"phi3": "modeling_phi3.Phi3ForCausalLM", "ernie4_5": "modeling_ernie4_5.Ernie4_5_ForCausalLM"}


@pytest.mark.parametrize("experts", [0, 1])
def test_no_experts_or_a_single_one_are_no_mixture(experts: int) -> None:
    raw = HF_TINY | {"model_type": "llama"}
    assert from_hf(raw | {"num_experts": experts, "num_local_experts": experts}) == from_hf(raw)


@pytest.mark.parametrize("model_type", CODE)
def test_a_familys_own_code_is_ignored_with_a_warning(model_type: str) -> None:
    raw = HF_TINY | {"model_type": model_type, "auto_map": {"AutoModelForCausalLM": CODE[model_type]}}
    with pytest.warns(LlamaMiniWarning, match="auto_map ignored: code that comes with a checkpoint is never run"):
        from_hf(raw)
    with pytest.raises(ConfigError, match=r"auto_map is .*never run"):
        from_hf(raw | {"model_type": "llama"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "olmo", "clip_qkv": 8.0, "rms_norm_eps": None}, "clip_qkv is 8.0; only None"),
        ({"model_type": "cohere", "use_qk_norm": True, "rms_norm_eps": None}, "use_qk_norm is True; only False"),
        ({"model_type": "stablelm", "qk_layernorm": True, "rms_norm_eps": None}, "qk_layernorm is True; only False"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; only None"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gemma", "hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu_pytorch_tanh' and 'gelu'"),
        ({"model_type": "hyperclovax", "use_post_norm": False}, "use_post_norm is False; only True"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling must be"),
        ({"model_type": "granite", "residual_multiplier": "a"}, "residual_multiplier must be"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "known: default, longrope"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "partial_rotary_factor must be"),
        ({"model_type": "glm", "partial_rotary_factor": 0.4}, "rotary_dim must be even"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers must list 0 or 1 for each of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval must be a whole number"),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": "LG"},
            "sliding_window_pattern must be a whole",
        ),
        ({"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": -1}}, "alpha must be"),
        ({"model_type": "llama", "rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0; only None"),
        ({"model_type": "internlm3", "bias": True, "mlp_bias": False}, "bias is True, but another key says otherwise"),
        ({"model_type": "minimax_m2", "num_local_experts": 256}, "num_local_experts is 256: .* a mixture of experts"),
        ({"model_type": "dots1", "n_routed_experts": 128}, "n_routed_experts is 128: .* a mixture of experts"),
        ({"model_type": "llama", "num_experts": 8}, "num_experts is 8: this is a mixture of experts, which is not"),
        ({"model_type": "llama", "kv_lora_rank": 512}, r"kv_lora_rank is 512: this is a model with latent attention"),
        ({"model_type": "mixtral"}, "'mixtral' is a mixture of experts, which is not read; the model_types that can"),
        ({"model_type": "deepseek_v3"}, "'deepseek_v3' is a mixture of experts"),
        ({"model_type": "mamba2"}, "'mamba2' is a state space or recurrent model"),
        ({"model_type": "minicpm3"}, "'minicpm3' is a model with latent attention"),
        ({"model_type": "granite_swa"}, "'granite_swa' is a model with learned attention sinks"),
        ({"model_type": "granitemoeshared"}, "'granitemoeshared' is a mixture of experts"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 72}, "num_local_experts is 72: .* mixture"),
        ({"model_type": "granitemoehybrid"}, "layer_types is None: state spaces are not read"),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
            r"layer_types is \['mamba', .*spaces",
        ),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hf(HF_TINY | changes)
