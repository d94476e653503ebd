"""The supported Hugging Face families: the tensor names of each, and what its configuration means.

Source of the defaults: the configuration classes of transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_mini.checkpoint.keys import LLAMA_KEYS, OLMO2_KEYS, QWEN3_KEYS, KeyTable
from llama_mini.model.norm_plan import NormPlan


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    plan: the preset of its norms.
    late: its norms round to the model's dtype after the gain, not before it.
    biases: `attention`: q, k, v and o, if `attention_bias` is true; `attention+mlp`: also the MLP, if `mlp_bias` is
        true; `qkv`: q, k and v, always.
    window: the layers that may have a sliding window: none, every layer, or those that the configuration lists.
    defaults: the values of absent keys.
    """

    model_type: str
    architecture: str
    keys: KeyTable
    plan: str = "pre"
    late: bool = False
    interleaved: bool = False
    biases: Literal["attention", "attention+mlp", "none", "qkv"] = "none"
    window: Literal["none", "every", "listed"] = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def norm_plan(self, n_layers: int) -> NormPlan:
        plan = NormPlan.parse(self.plan, n_layers)
        return plan.with_norms(cast="late") if self.late else plan


_ALL = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        keys=LLAMA_KEYS,
        biases="attention+mlp",
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        keys=LLAMA_KEYS,
        window="every",
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        keys=LLAMA_KEYS,
        biases="qkv",
        window="listed",
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        keys=QWEN3_KEYS,
        plan="pre+qk",
        biases="attention",
        window="listed",
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        keys=OLMO2_KEYS,
        plan="out+qk:full",
        late=True,
        biases="attention",
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    ),
)
FAMILIES = {family.model_type: family for family in _ALL}
OWN = "llama_mini"  # the model_type of a model that no family describes; it is saved under our own names
KNOWN = (*FAMILIES, OWN)


def has_interleaved_pairs(model_type: str) -> bool:
    """Whether rotary pairs lie side by side in the family's files."""
    return model_type != OWN and FAMILIES[model_type].interleaved


def key_table(model_type: str) -> KeyTable:
    return {} if model_type == OWN else FAMILIES[model_type].keys
