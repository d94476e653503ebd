"""Metadata of every architecture -> LlamaConfig; the values without a key are those in llama.cpp's src/models/*.cpp."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_mini.checkpoint.gguf.architectures import ARCHITECTURES
from llama_mini.checkpoint.gguf.header import GGUFHeader, GGUFTensor
from llama_mini.checkpoint.gguf.model import gguf_config
from llama_mini.checkpoint.hf.config import to_hf
from llama_mini.errors import ConfigError
from llama_mini.model.config import LlamaConfig

SIZES = {"block_count": 8, "context_length": 64, "embedding_length": 48, "feed_forward_length": 40}
SIZES |= {"attention.head_count": 4, "attention.key_length": 16, "attention.value_length": 16, "rope.freq_base": 5e5}
EPS = {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-6}
REQUIRED = {
    "granite": {"logit_scale": 8.0},
    "cohere2": {"logit_scale": 0.5, "attention.sliding_window": 8},
}


def config(architecture: str, n_layers: int = 8, more: str = "", **changes: Any) -> LlamaConfig:
    """The configuration of a file that has an embedding and the tensor `more`; `__` stands for a dot."""
    given = SIZES | EPS | REQUIRED.get(architecture, {}) | {"block_count": n_layers}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {f"{architecture}.{key}": value for key, value in given.items()}
    tensors = {name: GGUFTensor(name, (50, 48), "F32", 0, 9600) for name in ("token_embd.weight", more)}
    return gguf_config(GGUFHeader(Path("tiny.gguf"), 3, metadata | {"general.architecture": architecture}, tensors))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_with_sizes_alone(architecture: str) -> None:
    found = config(architecture)
    kind = found.norm_plan.final
    assert kind is not None
    assert found.norm_eps == (1e-5 if kind.kind == "layer" else 1e-6)
    assert (found.dim, found.n_layers, found.n_heads, found.head_dim, found.max_seq_len) == (48, 8, 4, 16, 64)
    assert (found.rope_theta, found.rope_scaling, found.rotary_dim) == (5e5, None, 16)
    windowed = {"gemma2": 4096, "cohere2": 8}
    assert found.sliding_window == windowed.get(architecture)
    no_gate = {"arcee": "relu2", "nemotron": "relu2", "jais2": "relu2", "starcoder2": "gelu_tanh"}
    gated = {"gemma": "gelu_tanh", "gemma2": "gelu_tanh", "gemma3": "gelu_tanh"}
    assert found.gated_mlp == (architecture not in no_gate)
    assert found.activation == (no_gate | gated).get(architecture, "silu")
    assert found.qk_norm_after_rope == (architecture == "hunyuan-dense")
    assert found.embedding_scale == (48**0.5 if architecture.startswith("gemma") else 1)


def test_gemma_2_and_3_have_settings_that_no_key_states() -> None:
    found = config("gemma2")
    assert (found.sliding_layers, found.sliding_rope_theta) == ((0, 2, 4, 6), None)
    assert (found.attention_softcap, found.logit_softcap, found.attention_scale) == (50.0, 30.0, None)
    assert config("gemma2", 46).attention_scale == 12**-0.5  # the model of 27B: width / heads, not the heads' own width
    found = config("gemma2", attention__sliding_window=9, final_logit_softcapping=20.0, attn_logit_softcapping=25.0)
    assert (found.sliding_window, found.attention_softcap, found.logit_softcap) == (9, 25.0, 20.0)

    assert config("gemma3").sliding_layers == ()
    found = config("gemma3", 14, attention__sliding_window=9, rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert found.sliding_layers == (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13)
    assert (found.sliding_rope_theta, found.sliding_rope_scaling) == (10_000.0, None)
    assert found.rope_scaling is not None
    assert (found.attention_scale, found.attention_softcap, found.logit_softcap) == (None, None, None)
    assert config("gemma3", 62).attention_scale == 12**-0.5
    assert config("gemma3", attention__sliding_window=9, rope__freq_base_swa=777.0).sliding_rope_theta == 777.0


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        (3, (0, 1, 3, 4, 6, 7)),
        (1, ()),
        (0, tuple(range(8))),
        (np.array([1, 0, 0, 1, 0, 0, 0, 0], bool), (0, 3)),
        (np.ones(8, np.int32), tuple(range(8))),
    ],
    ids=["number", "one", "zero", "flags", "numbers"],
)
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "olmo2", "exaone4", "cohere2", "phi3"])
def test_patterns_of_windows(architecture: str, pattern: Any, layers: tuple[int, ...]) -> None:
    changes = {"attention__sliding_window": 7, "attention__sliding_window_pattern": pattern}
    found = config(architecture, **changes)
    assert found.sliding_layers == layers
    assert found.sliding_window == (7 if layers else None)
    full = tuple(i for i in range(8) if i not in layers)
    assert found.unrotated_layers == (full if architecture in ("cohere2", "exaone4") else ())


def test_windows_that_rotate_otherwise() -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "attention__sliding_window": 9}
    found = config("olmo2", **yarn)
    assert (found.sliding_rope_theta, found.sliding_rope_scaling) == (5e5, None)  # never scaled
    assert config("olmo2", attention__sliding_window=9).sliding_rope_theta is None
    for architecture in ("gemma2", "exaone4", "cohere2", "phi3"):
        assert config(architecture, **yarn).sliding_rope_theta is None


def test_layers_without_rotation() -> None:
    assert config("smollm3", 9).unrotated_layers == (3, 7)
    assert config("exaone4").unrotated_layers == ()
    found = config("exaone4", 64)  # the model of 32B
    assert (found.sliding_window, found.sliding_layers[:4], found.unrotated_layers[:2]) == (4096, (0, 1, 2, 4), (3, 7))
    assert config("granite", rope__scaling__finetuned=True).unrotated_layers == ()
    unrotated = config("granite", 3, rope__scaling__finetuned=False)
    assert unrotated.unrotated_layers == (0, 1, 2)
    assert to_hf(unrotated, "float32", "granite")["model_type"] == "granitemoehybrid"


def test_scales_of_granite_and_cohere() -> None:
    found = config("granite", embedding_scale=12.0, residual_scale=0.22, attention__scale=0.015625)
    assert (found.embedding_scale, found.attention_scale, found.logit_scale) == (12.0, 0.015625, 1 / 8)
    assert found.norm_plan.attention.beta == found.norm_plan.feed_forward.beta == 0.22
    found = config("granite", embedding_scale=0.0, residual_scale=0.0, attention__scale=0.0)  # as if they were absent
    assert found == config("granite")
    assert config("granite", attention__scale=0.25).attention_scale is None  # the usual one
    assert config("cohere2", logit_scale=0.25).logit_scale == 0.25
    assert config("command-r").logit_scale == 1


def test_granite_4_without_state_spaces_keeps_their_keys() -> None:
    keys = ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")
    unused: dict[str, Any] = {f"ssm__{key}": 4 for key in keys} | {"expert_shared_feed_forward_length": 40}
    per_layer = {"attention__head_count_kv": np.full(8, 2, np.uint32), "expert_count": 0, "expert_used_count": 0}
    assert config("granite", **unused, **per_layer) == config("granite", attention__head_count_kv=2)


def test_the_tensors_tell_whether_layers_are_parallel() -> None:
    assert config("stablelm", use_parallel_residual=False).norm_plan.parallel
    found = config("stablelm", more="blk.0.ffn_norm.weight", use_parallel_residual=True)
    assert not found.norm_plan.parallel


@pytest.mark.parametrize("architecture", ["stablelm", "command-r"])
def test_norms_of_single_heads_are_refused(architecture: str) -> None:
    with pytest.raises(
        ConfigError, match=r"tiny\.gguf: blk\.0\.attn_q_norm\.weight norms each head by gains of its own"
    ):
        config(architecture, more="blk.0.attn_q_norm.weight")


def test_a_part_of_a_head_is_rotated() -> None:
    for architecture in ("phi3", "chatglm", "glm4", "nemotron", "stablelm"):
        assert config(architecture, rope__dimension_count=8).rotary_dim == 8


REFUSED = {
    "no window": ("cohere2", {"attention__sliding_window": None}, "cohere2.attention.sliding_window is missing"),
    "window": ("granite", {"attention__sliding_window": 9}, "granite.attention.sliding_window is 9; only 0"),
    "window of text": ("phi3", {"attention__sliding_window": "a"}, "sliding_window must be .* not 'a'"),
    "short pattern": ("gemma2", {"attention__sliding_window_pattern": np.ones(3, bool)}, "flag for each of 8 layers"),
    "pattern of text": ("gemma2", {"attention__sliding_window_pattern": ["a"] * 8}, "flag for each of 8 layers"),
    "pattern of floats": ("gemma2", {"attention__sliding_window_pattern": np.ones(8)}, "flag for each of 8 layers"),
    "negative pattern": ("gemma2", {"attention__sliding_window_pattern": -2}, "sliding_window_pattern is -2"),
    "cap": ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; .* not implemented"),
    "cap of zero": ("gemma2", {"attn_logit_softcapping": 0.0}, "attention_softcap must be .* above 0"),
    "scale of zero": ("granite", {"logit_scale": 0.0}, "granite.logit_scale must be .* above 0"),
    "scale of text": ("granite", {"logit_scale": "a"}, "granite.logit_scale must be"),
    "residual": ("granite", {"residual_scale": "a"}, "beta must be a finite number"),
    "scale elsewhere": ("llama", {"logit_scale": 2.0}, "llama.logit_scale is 2.0; only 1 is implemented"),
    "temperature": ("mistral3", {"attention__temperature_scale": 0.1}, "temperature_scale is 0.1; without .* yarn"),
    "temperature elsewhere": ("llama", {"attention__temperature_scale": 0.1}, "temperature_scale is 0.1; only 0"),
    "temperature of text": (
        "mistral3",
        {"attention__temperature_scale": "a", "rope__scaling__type": "yarn", "rope__scaling__factor": 4.0},
        "q_growth must be .* not 'a'",
    ),
    "clamp": ("olmo", {"attention__clamp_kqv": 8.0}, "olmo.attention.clamp_kqv is 8.0; only 0"),
    "state space": ("llama", {"ssm__conv_kernel": 4}, "llama.ssm.conv_kernel is 4; this setting is not implemented"),
    "experts": ("granite", {"expert_count": 8}, "granite.expert_count is 8"),
    "partial": ("granite", {"rope__dimension_count": 8}, "granite.rope.dimension_count is 8; only .* 16"),
    "odd part": ("phi3", {"rope__dimension_count": 7}, "rotary_dim must be even"),
    "large part": ("phi3", {"rope__dimension_count": 18}, "rotary_dim must be .* 16"),
    "other eps": (
        "nemotron",
        {"attention__layer_norm_epsilon": None},
        "nemotron.attention.layer_norm_epsilon is missing",
    ),
    "deepstack": ("granite", {"deepstack_mapping": np.arange(8)}, "granite.deepstack_mapping is .* not implemented"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str) -> None:
    architecture, changes, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence) as caught:
        config(architecture, **changes)
    assert str(caught.value).startswith("tiny.gguf: ")


def test_an_unknown_architecture_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"unknown .* 'mamba'; known: {re.escape(', '.join(ARCHITECTURES))}"):
        config("mamba")
