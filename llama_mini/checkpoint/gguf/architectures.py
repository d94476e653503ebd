"""What each architecture of a GGUF file means: whose norms it has, how its tensors lie, and which settings it has.

A setting without a key in the metadata is what llama.cpp has in its code (src/models/ has one file for each name).
"""

from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from llama_mini.checkpoint.gguf.metadata import Metadata
from llama_mini.checkpoint.keys import KeyTable
from llama_mini.errors import ConfigError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.rope_scaling import YarnScaling
from llama_mini.validate import check_number, short_repr

_NAMES = {
    "token_embd": "tok_embeddings",
    "blk.{}.attn_norm": "layers.{}.attention.pre_norm",
    "blk.{}.attn_q": "layers.{}.attention.q_proj",
    "blk.{}.attn_k": "layers.{}.attention.k_proj",
    "blk.{}.attn_v": "layers.{}.attention.v_proj",
    "blk.{}.attn_output": "layers.{}.attention.o_proj",
    "blk.{}.attn_q_norm": "layers.{}.attention.q_norm",
    "blk.{}.attn_k_norm": "layers.{}.attention.k_norm",
    "blk.{}.post_attention_norm": "layers.{}.attention.out_norm",
    "blk.{}.ffn_norm": "layers.{}.feed_forward.pre_norm",
    "blk.{}.ffn_gate": "layers.{}.feed_forward.gate_proj",
    "blk.{}.ffn_up": "layers.{}.feed_forward.up_proj",
    "blk.{}.ffn_down": "layers.{}.feed_forward.down_proj",
    "blk.{}.post_ffw_norm": "layers.{}.feed_forward.out_norm",
    "output_norm": "norm",
    "output": "lm_head",
}
_QKV = {"blk.{}.attn_qkv": [("q", "blk.{}.attn_q"), ("k", "blk.{}.attn_k"), ("v", "blk.{}.attn_v")]}
_GATE_UP = {"blk.{}.ffn_up": [("gate", "blk.{}.ffn_gate"), ("up", "blk.{}.ffn_up")]}

# Granite 4 without state spaces and experts is this architecture too, and keeps these keys of those that have them.
_OF_HYBRIDS = [f"ssm.{key}" for key in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")]
_OF_HYBRIDS.append("expert_shared_feed_forward_length")

Settings = Callable[[LlamaConfig, Metadata], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    family: the model_type that has its norms, and as which it is saved.
    pairs: whether the rotary pairs of q and k lie side by side in the file.
    partial: whether the first `rope.dimension_count` elements of a head may be rotated alone.
    joined: whether ffn_up holds the gate too, above itself. Any file may have attn_qkv in place of q, k and v.
    names: tensor names with another meaning than in most architectures.
    settings: (the configuration as if it were a LLaMA's, the metadata) -> the fields that differ.
    """

    family: str
    _: KW_ONLY
    pairs: bool = False
    partial: bool = False
    joined: bool = False
    names: KeyTable | None = None
    settings: Settings = lambda *_: {}

    def keys(self, tensors: Collection[str]) -> KeyTable:
        """Tensor names, as this file spells them, -> ours."""
        own = self.names or {}
        names = {theirs: ours for theirs, ours in _NAMES.items() if ours not in own.values()} | own
        table = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in names.items() for kind in ("weight", "bias")}
        for whole, parts in (_QKV | (_GATE_UP if self.joined else {})).items():
            for kind in ("weight", "bias"):
                if f"{whole.format(0)}.{kind}" in tensors:
                    ours = {f"{whole}.{kind}[{part}]": table.pop(f"{name}.{kind}") for part, name in parts}
                    table |= ours
        return table


def _mistral_3(config: LlamaConfig, file: Metadata) -> dict[str, Any]:
    growth, yarn = file.get("attention.temperature_scale", 0), config.rope_scaling
    if growth and not isinstance(yarn, YarnScaling):
        key = f"mistral3.attention.temperature_scale is {short_repr(growth)}"
        raise ConfigError(f"{key}; without rope.scaling.type yarn it must be 0")
    return {"rope_scaling": replace(yarn, q_growth=growth)} if isinstance(yarn, YarnScaling) else {}


def _windows(
    config: LlamaConfig, file: Metadata, period: int, default: int = 0, scaled: bool = True, theta: float | None = None
) -> dict[str, Any]:
    """The layers with a window: all but every `period`-th. They may have a rotary base of their own, or no scaling."""
    window = file.get("attention.sliding_window", default)
    layers = file.layers("attention.sliding_window_pattern", period, config.n_layers)
    base = file.get("rope.freq_base_swa", theta or config.rope_theta)
    scaling = config.rope_scaling if scaled else None
    if not window or not layers:
        return {}
    rope = {"sliding_rope_theta": base, "sliding_rope_scaling": scaling}
    same = (base, scaling) == (config.rope_theta, config.rope_scaling)
    return {"sliding_window": window, "sliding_layers": layers, **({} if same else rope)}


def _rotated_in_windows(config: LlamaConfig, file: Metadata, default: int = 0) -> dict[str, Any]:
    """In a model with a window, the layers without it are not rotated."""
    windows, given = _windows(config, file, 4, default), file.get("attention.sliding_window", default)
    sliding = windows.get("sliding_layers", ())
    return {**windows, "unrotated_layers": tuple(i for i in range(config.n_layers) if given and i not in sliding)}


def _gemma(config: LlamaConfig, _: Metadata) -> dict[str, Any]:
    return {"activation": "gelu_tanh", "embedding_scale": config.dim**0.5}


def _gemma_2(config: LlamaConfig, file: Metadata) -> dict[str, Any]:
    return {
        **_gemma(config, file),
        **_windows(config, file, period=2, default=4096),
        "attention_scale": _gemma_scale(config, 46),
        "attention_softcap": file.get("attn_logit_softcapping", 50.0),
        "logit_softcap": file.get("final_logit_softcapping", 30.0),
    }


def _gemma_3(config: LlamaConfig, file: Metadata) -> dict[str, Any]:
    return {
        **_gemma(config, file),
        **_windows(config, file, period=6, scaled=False, theta=10_000.0),
        "attention_scale": _gemma_scale(config, 62),
        "logit_softcap": file.get("final_logit_softcapping", 0) or None,
    }


def _gemma_scale(config: LlamaConfig, n_layers: int) -> float:
    """The models of 27B, which have `n_layers`, take the width of the stream over the heads for the width of a head."""
    return (config.dim / config.n_heads if config.n_layers == n_layers else config.head_dim) ** -0.5


def _granite(config: LlamaConfig, file: Metadata) -> dict[str, Any]:
    file.ignore(*_OF_HYBRIDS)
    beta, divisor, plan = file.get("residual_scale", 0) or 1.0, file.get("logit_scale"), config.norm_plan
    check_number("granite.logit_scale", divisor, ConfigError, above=0)
    unrotated = tuple(range(config.n_layers)) if not file.get("rope.scaling.finetuned", True) else ()
    return {
        "embedding_scale": file.get("embedding_scale", 0) or 1.0,
        "attention_scale": file.get("attention.scale", 0) or None,
        "logit_scale": 1 / divisor,
        "unrotated_layers": unrotated,
        "norm_plan": replace(
            plan, attention=replace(plan.attention, beta=beta), feed_forward=replace(plan.feed_forward, beta=beta)
        ),
    }


def _no_gate(*_: Any) -> dict[str, Any]:
    return {"activation": "relu2", "gated_mlp": False}


def _refuse_norms_of_heads(file: Metadata) -> None:
    if (name := "blk.0.attn_q_norm.weight") in file.tensors:
        raise ConfigError(f"{name} norms each head by gains of its own; that is not implemented in {file.architecture}")


def _cohere(config: LlamaConfig, file: Metadata) -> dict[str, Any]:
    _refuse_norms_of_heads(file)
    return {"logit_scale": file.get("logit_scale", 1.0) or 1.0}


def _cohere_2(config: LlamaConfig, file: Metadata) -> dict[str, Any]:
    required = file.get("attention.sliding_window")
    return {**_cohere(config, file), **_rotated_in_windows(config, file, default=required)}


def _stablelm(config: LlamaConfig, file: Metadata) -> dict[str, Any]:
    """The tensors decide whether layers are parallel: the converter writes the key as true if config.json has none."""
    _refuse_norms_of_heads(file)
    file.ignore("use_parallel_residual")
    if "blk.0.ffn_norm.weight" in file.tensors:
        return {}
    plan = config.norm_plan
    return {"norm_plan": replace(plan, parallel=True, feed_forward=replace(plan.feed_forward, pre=None))}


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "mistral3": Architecture("mistral", pairs=True, settings=_mistral_3),
    "internlm2": Architecture("llama", pairs=True),
    "exaone": Architecture("llama"),
    "seed_oss": Architecture("seed_oss", names={"blk.{}.post_attention_norm": "layers.{}.feed_forward.pre_norm"}),
    "smollm3": Architecture(
        "smollm3", pairs=True, settings=lambda config, _: {"unrotated_layers": tuple(range(3, config.n_layers, 4))}
    ),
    "ernie4_5": Architecture("ernie4_5", pairs=True),
    "phi3": Architecture("phi3", partial=True, joined=True, settings=lambda config, file: _windows(config, file, 0)),
    "granite": Architecture("granite", pairs=True, settings=_granite),
    "arcee": Architecture("arcee", pairs=True, settings=_no_gate),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", settings=lambda *_: {"qk_norm_after_rope": True}),
    "gemma": Architecture("gemma", partial=True, settings=_gemma),
    "gemma2": Architecture("gemma2", partial=True, settings=_gemma_2),
    "gemma3": Architecture("gemma3_text", partial=True, settings=_gemma_3),
    "chatglm": Architecture("glm", pairs=True, partial=True, joined=True),
    "glm4": Architecture("glm4", pairs=True, partial=True, joined=True),
    "olmo": Architecture("olmo", pairs=True),
    "olmo2": Architecture("olmo2", settings=lambda config, file: _windows(config, file, 4, scaled=False)),
    "exaone4": Architecture(
        "exaone4", settings=lambda config, file: _rotated_in_windows(config, file, 4096 if config.n_layers == 64 else 0)
    ),
    "cohere2": Architecture("cohere2", pairs=True, partial=True, settings=_cohere_2),
    "command-r": Architecture("cohere", pairs=True, partial=True, settings=_cohere),
    "nemotron": Architecture("nemotron", partial=True, settings=_no_gate),
    "jais2": Architecture("jais2", settings=_no_gate),
    "starcoder2": Architecture("starcoder2", settings=lambda *_: {"activation": "gelu_tanh", "gated_mlp": False}),
    "stablelm": Architecture("stablelm", partial=True, settings=_stablelm),
}
