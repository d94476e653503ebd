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
    return settings


def random_model(model_type: str, seed: int, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **random_settings(model_type, seed) | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            values = rng.uniform(0.5, 1.5, parameter.shape)
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
