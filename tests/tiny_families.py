"""Random tiny models of every family, as transformers makes them: gains and biases are never left alone."""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONTEXT = 48  # the original one: texts go past it where the rope type says what happens there
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn, all keys": {"factor": 3.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
    "yarn, mscale": {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
}
ORIGINAL = "original_max_position_embeddings"


def rope(kind: str, theta: float) -> dict[str, Any]:
    name = kind.partition(",")[0]
    original = {ORIGINAL: CONTEXT} if name in ("llama3", "yarn") else {}
    return {"rope_type": name, "rope_theta": theta} | ROPES[kind] | original


def random_settings(model_type: str, seed: int) -> dict[str, Any]:
    """Sizes and settings of a tiny model: MQA to MHA, any head_dim, tied or not, biases, windows."""
    rng = np.random.default_rng([seed, *model_type.encode()])
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    n_heads = int(pick(2, 4, 6))
    n_kv_heads = int(pick(*(n for n in (1, 2, 3, 6) if n_heads % n == 0)))
    kind = list(ROPES)[seed % len(ROPES)]  # each at least twice
    settings = {
        "hidden_size": n_heads * int(pick(6, 8, 10)),
        "num_hidden_layers": 3,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": int(pick(40, 72)),
        "vocab_size": 97,
        "max_position_embeddings": CONTEXT if kind in ("dynamic", "default") else 4 * CONTEXT,
        "rms_norm_eps": float(pick(1e-6, 1e-5, 1e-3)),
        "tie_word_embeddings": bool(pick(True, False)),
        "rope_parameters": rope(kind, float(pick(10_000.0, 500_000.0))),
    }
    if model_type in ("llama", "mistral", "qwen2", "qwen3"):
        settings["head_dim"] = int(pick(6, 8, 16))
    if model_type in ("llama", "qwen3", "olmo2"):
        settings["attention_bias"] = bool(pick(True, False))
    if model_type == "llama":
        settings["mlp_bias"] = bool(pick(True, False))
    if model_type == "mistral":
        settings["sliding_window"] = pick(None, 7, 30)
    if model_type in ("qwen2", "qwen3") and pick(True, False):
        settings |= {"use_sliding_window": True, "sliding_window": int(pick(5, 20))}
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        settings |= pick({"max_window_layers": 1}, {"layer_types": kinds})
    return settings | _further_settings(model_type, pick, settings["rope_parameters"])


# What else a family reads, with the values that tests draw. Windows and the rope of window layers come below.
FLAGS = (True, False)
ACTIVATION: dict[str, Any] = {"hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "relu2")}
BIASES: dict[str, Any] = {"attention_bias": FLAGS, "mlp_bias": FLAGS}
MUP: dict[str, Any] = {
    "embedding_multiplier": (1.0, 3.5, 12),
    "attention_multiplier": (0.2, 0.5),
    "residual_multiplier": (0.22, 1.0),
    "logits_scaling": (1.0, 7, 0.35),
}
HEAD_DIM: dict[str, Any] = {"head_dim": (6, 8, 16)}
GEMMA: dict[str, Any] = HEAD_DIM | {"attention_bias": FLAGS}
GEMMA_2: dict[str, Any] = GEMMA | {
    "hidden_activation": ("gelu_pytorch_tanh", "silu", "gelu"),
    "query_pre_attn_scalar": (3, 16, 49),
    "final_logit_softcapping": (None, 4.0, 30.0),
    "attn_logit_softcapping": (None, 1.5, 50.0),
}
PARTIAL: dict[str, Any] = {"partial_rotary_factor": (0.5, 1.0, 0.25)}
CHOICES: dict[str, dict[str, Any]] = {
    "olmo": {"attention_bias": FLAGS},
    "olmo3": {"attention_bias": FLAGS},
    "seed_oss": HEAD_DIM | BIASES | {"attention_out_bias": FLAGS},
    "internlm3": HEAD_DIM | {"mlp_bias": FLAGS},
    "iquestcoder": HEAD_DIM | BIASES,
    "ministral": HEAD_DIM,
    "ministral3": HEAD_DIM | {"sliding_window": (None, 7)},
    "cwm": HEAD_DIM | ACTIVATION,
    "smollm3": BIASES | {"no_rope_layer_interval": (1, 2, 4), "no_rope_layers": (None, [1, 0, 0, 1])},
    "ernie4_5": HEAD_DIM | {"use_bias": FLAGS},
    "helium": BIASES | {"head_dim": (16,)},
    "phi3": PARTIAL | {"sliding_window": (None, 7)},
    "granite": BIASES | MUP,
    "granitemoehybrid": MUP
    | {
        "attention_bias": FLAGS,
        "shared_intermediate_size": (24, 40),
        "position_embedding_type": (None, "rope"),
        "layer_types": (["attention"] * 3,),
        "num_local_experts": (0,),
        "mamba_n_heads": (1,),
    },
    "hyperclovax": BIASES | MUP | {"attention_multiplier": (None, 0.3), "logits_scaling": (1.0, 0.35)},
    "gemma": GEMMA,
    "gemma2": GEMMA_2,
    "vaultgemma": GEMMA_2,
    "gemma3_text": GEMMA_2 | {"attn_logit_softcapping": (None,)},
    "glm": HEAD_DIM | PARTIAL | {"attention_bias": FLAGS},
    "glm4": HEAD_DIM | PARTIAL | {"attention_bias": FLAGS},
    "arcee": HEAD_DIM | BIASES | {"hidden_act": ("relu2", "gelu")},
    "hunyuan_v1_dense": HEAD_DIM | {"attention_bias": FLAGS},
    "nemotron": HEAD_DIM | PARTIAL | BIASES,
    "jais2": HEAD_DIM | BIASES,
    "stablelm": PARTIAL | {"use_qkv_bias": FLAGS, "use_parallel_residual": FLAGS},
    "starcoder2": {"use_bias": FLAGS, "sliding_window": (None, 7)},
    "cohere": {"attention_bias": FLAGS, "logit_scale": (0.0625, 1.5)},
    "cohere2": {"attention_bias": FLAGS, "logit_scale": (0.0625, 1.5)},
    "exaone4": {},
}
LISTED = ("ministral", "cwm", "exaone4", "smollm3", "olmo3", "gemma2", "vaultgemma", "gemma3_text", "cohere2")
EPS = {"olmo": None, "nemotron": "norm_eps", "starcoder2": "norm_epsilon"}
EPS |= dict.fromkeys(("stablelm", "jais2", "cohere", "cohere2"), "layer_norm_eps")


def _further_settings(model_type: str, pick: Any, rope_parameters: dict[str, Any]) -> dict[str, Any]:
    settings = {key: pick(*values) for key, values in CHOICES.get(model_type, {}).items()}
    if "partial_rotary_factor" in settings:
        share = rope_parameters["partial_rotary_factor"] = settings.pop("partial_rotary_factor")
        settings |= {"head_dim": 16} if "head_dim" in settings else {}
    if "partial_rotary_factor" in rope_parameters or model_type == "helium":  # whole and even shares of a head
        settings |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": int(pick(1, 2, 4))}
    if model_type in CHOICES:
        settings["pad_token_id"] = None  # by default beyond the vocabulary
    if model_type == "phi3":
        for key in set(rope_parameters) - {"rope_theta", "partial_rotary_factor"}:
            del rope_parameters[key]
        rope_parameters["rope_type"] = pick("default", "longrope")
        if rope_parameters["rope_type"] == "longrope":
            for name in ("short_factor", "long_factor"):
                rope_parameters[name] = [float(pick(1.0, 1.5, 2.0)) for _ in range(int(16 * share) // 2)]
            settings |= {ORIGINAL: CONTEXT, "max_position_embeddings": 4 * CONTEXT}
    if model_type == "ministral3":
        rope_parameters |= ROPES["yarn"] | {"rope_type": "yarn", ORIGINAL: 20, "llama_4_scaling_beta": pick(0.1, 0.6)}
        for key in set(rope_parameters) - {"rope_type", "rope_theta", "factor", ORIGINAL, "llama_4_scaling_beta"}:
            del rope_parameters[key]
    if model_type == "internlm3":
        settings["attention_bias"] = settings["mlp_bias"]
    if model_type in LISTED:
        settings |= {"num_hidden_layers": 4, "sliding_window": int(pick(5, 20))}
        if pick(True, False) and model_type != "smollm3":
            settings["layer_types"] = [pick("sliding_attention", "full_attention") for _ in range(4)]
        elif model_type == "gemma3_text":
            settings["sliding_window_pattern"] = 2
    if model_type == "smollm3":
        settings["use_sliding_window"] = pick(True, False)
    if model_type in ("olmo3", "gemma3_text"):
        near = {"rope_type": "default", "rope_theta": float(pick(10_000.0, 2_000.0))}
        settings["rope_parameters"] = {"full_attention": rope_parameters, "sliding_attention": near}
    return settings


ONE_PLUS = ("gemma", "gemma2", "vaultgemma", "gemma3_text", "nemotron")  # the gain is 1 + w


def random_model(model_type: str, seed: int, **changes: Any) -> PreTrainedModel:
    settings = random_settings(model_type, seed) | changes
    if (key := EPS.get(model_type, "rms_norm_eps")) != "rms_norm_eps":
        eps = settings.pop("rms_norm_eps")
        settings |= {} if key is None else {key: eps}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            values = rng.uniform(0.5, 1.5, parameter.shape) - (model_type in ONE_PLUS)
        elif parameter.ndim == 1:
            values = rng.standard_normal(parameter.shape) * 0.5
        else:
            tied_or_matrix = "embed" not in name or config.tie_word_embeddings
            values = rng.standard_normal(parameter.shape) / np.sqrt(parameter.shape[1] if tied_or_matrix else 1)
        parameter.data.copy_(torch.from_numpy(values))
    return model


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits
