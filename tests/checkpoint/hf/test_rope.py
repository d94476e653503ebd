"""The rotary settings of a config.json: every type and spelling against transformers' tables and logits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as HFConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_mini.checkpoint.hf.config import from_hf, to_hf
from llama_mini.errors import ConfigError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope import RotaryEmbedding
from llama_mini.model.rope_scaling import LongRopeScaling, RopeScaling
from tests.tiny_families import logits, random_model
from tests.tiny_models import HF_TINY, random_tokens

BASE: dict[str, Any] = {"model_type": "llama"} | HF_TINY  # 128 positions, heads of 8
ORIGINAL = {"original_max_position_embeddings": 32}
SHORT, LONG = (np.random.default_rng(7).uniform(1, most, 4).tolist() for most in (2, 40))
DEFAULT = {"rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGINAL
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
MROPE = {"mrope_section": [1, 1, 2], "mrope_interleaved": True}


def scaling(rope: dict[str, Any], **changes: Any) -> RopeScaling | None:
    return from_hf(BASE | {"rope_scaling": rope} | changes).rope_scaling


def save(directory: Path, model: Any, rope: dict[str, Any], **changes: Any) -> Path:
    """A model of transformers, its config.json in the spelling of v4."""
    model.save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    (directory / "config.json").write_text(json.dumps(raw | {"rope_theta": theta, "rope_scaling": rope} | changes))
    return directory


# --- keys that are not used ---


@pytest.mark.parametrize(
    ("used", "unused", "line"),
    [
        (DEFAULT, {"factor": 2}, "unknown factor ignored"),
        (DEFAULT, ORIGINAL, "unknown original_max_position_embeddings ignored"),
        (LINEAR, ORIGINAL | {"zebra": 1}, "unknown original_max_position_embeddings, zebra ignored"),
        (LINEAR, {"zebra": 1, "beta_fast": 32}, "unknown beta_fast, zebra ignored"),
        (LINEAR, {"type": "linear", "attn_factor": 0.5}, "unknown attn_factor ignored"),
        (LLAMA_3, {"attention_factor": 2.0}, "unknown attention_factor ignored"),
        (YARN, {"short_factor": [1]}, "unknown short_factor ignored"),
        (LONGROPE, {"short_mscale": 1.1, "long_mscale": 1.2}, "unknown long_mscale, short_mscale ignored"),
        (DEFAULT, MROPE, "mrope_interleaved, mrope_section ignored, since only images"),
        (DEFAULT, MROPE | {"type": "mrope"}, "mrope_interleaved, mrope_section ignored"),
        ({}, MROPE | {"type": "mrope"}, "mrope_interleaved, mrope_section ignored"),
        ({}, {"mrope_section": [1, 1, 2]}, "mrope_section ignored"),
        (YARN, {"mrope_section": [1, 1, 2], "zebra": 1}, "mrope_section ignored.*; unknown zebra ignored"),
    ],
)
def test_unknown_keys_are_one_warning_and_change_nothing(used: Any, unused: Any, line: str) -> None:
    expected = scaling(used)
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.warns(LlamaMiniWarning, match=f"^config.json: {key}: {line}") as caught:
            assert from_hf(BASE | {key: used | unused}).rope_scaling == expected
        assert len(caught) == 1


def test_a_null_is_not_given_and_says_nothing() -> None:
    nothing = dict.fromkeys(["zebra", "attention_factor", "beta_fast", "truncate", "mscale", "mrope_section", "type"])
    assert scaling(YARN | nothing) == scaling(YARN)
    assert scaling({"type": None, "rope_type": None}) is None


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"factor": 4.0}, "rope_scaling has a factor but no rope_type; known: default, .*, longrope"),
        ({"rope_type": "ntk"}, "unknown rope type 'ntk'; known: default, linear, dynamic, llama3, yarn, longrope"),
        ({"full_attention": DEFAULT}, "rope_scaling: full_attention has its own settings"),
        (YARN | {"attention_factor": -1.0}, "rope_scaling.attention_factor must be"),
        (YARN | {"truncate": "no"}, "truncate must be true or false"),
        (LONGROPE | {"factor": "4"}, "rope_scaling.factor must be a finite number"),
        (LONGROPE | {"short_factor": [1.0, 0.0, 1.0, 1.0]}, r"short_factor\[1\] must be"),
        (LONGROPE | {"long_factor": 2.0}, "long_factor must be a list of numbers, not 2.0"),
        ({"rope_type": "longrope", "short_factor": SHORT}, "type longrope: long_factor missing"),
        (LONGROPE | {"short_factor": SHORT[:3]}, "short_factor has 3 numbers, but long_factor 4"),
        (LONGROPE | {"short_factor": [1.0], "long_factor": [1.0]}, "has 1 numbers; 8 rotated elements need 4"),
        (DEFAULT | {"original_max_position_embeddings": [1]}, r"scaling.original_max_.* must be .*, not \[1\]"),
        (LONGROPE | {"original_max_position_embeddings": "a"}, "original_max_position_embeddings must be a whole"),
        (LONGROPE | {"original_max_position_embeddings": 1}, "original_max_position_embeddings must be .* from 2"),
    ],
)
def test_a_wrong_value_or_type_is_refused_by_name(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaling(rope)


def test_the_original_context_of_a_model_without_scaling_says_nothing() -> None:
    """Phi-3 has the key at the top with every rope type, and transformers reads it for longrope alone."""
    assert from_hf(BASE | ORIGINAL).rope_scaling is None
    assert scaling(LINEAR, **ORIGINAL) == scaling(LINEAR)
    with pytest.raises(ConfigError, match=r"^original_max_position_embeddings must be .*, not \[1\]"):
        from_hf(BASE | {"original_max_position_embeddings": [1]})


# --- attn_factor ---


def test_deepseeks_attn_factor_is_ignored_as_in_transformers_and_said(tmp_path: Path) -> None:
    """The block of deepseek-ai/DeepSeek-R1-0528-Qwen3-8B (deepseek-ai/DeepSeek-R1#684) with a shorter context."""
    rope = YARN | {"attn_factor": 0.8782488562869419}
    save(tmp_path / "hf", random_model("qwen3", 0, max_position_embeddings=128), rope)
    with pytest.warns(LlamaMiniWarning, match=r"attn_factor ignored, .* by 1\.139; vLLM") as caught:
        ours = Llama.from_pretrained(tmp_path / "hf")
    assert len(caught) == 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    tokens = random_tokens(1, 80)
    torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)
    assert scaling(rope | {"attention_factor": 1.0}) == scaling(YARN | {"attention_factor": 1.0})  # and says nothing


# --- longrope ---


@pytest.mark.parametrize(
    "extra",
    [
        ORIGINAL,
        {"factor": 3.0} | ORIGINAL,
        {"attention_factor": 1.3} | ORIGINAL,
        {"factor": 3.0, "attention_factor": 0.9, "original_max_position_embeddings": 32.0},
        {},  # the context itself is the original one
        {"original_max_position_embeddings": 256},
    ],
)
@pytest.mark.parametrize("length", [32, 33])
def test_longrope_tables_are_those_of_transformers_to_the_bit(extra: dict[str, Any], length: int) -> None:
    theirs = HFConfig(**HF_TINY, rope_parameters=LONGROPE | extra | {"rope_theta": 5e5})
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["longrope"](theirs, torch.device("cpu"), seq_len=length)
    positions = torch.arange(length)[None]
    angles = positions[0, :, None].float() * frequencies
    rope = RotaryEmbedding(from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": LONGROPE | extra}))
    for table, exact in zip(rope(positions), (angles.cos() * magnitude, angles.sin() * magnitude), strict=True):
        assert torch.equal(table[0, :, 0], exact)


def test_longrope_is_the_same_in_every_spelling() -> None:
    expected = scaling(LONGROPE | ORIGINAL)
    assert isinstance(expected, LongRopeScaling)
    assert expected.original_max_seq_len == 32
    lists = {"short_factor": SHORT, "long_factor": LONG}
    for rope in ({"type": "su"} | lists, {"type": "longrope", "rope_type": "su"} | lists, LONGROPE):
        assert scaling(rope | ORIGINAL) == expected
        assert scaling(rope, **ORIGINAL) == expected
        assert scaling(rope | {"original_max_position_embeddings": 64}, **ORIGINAL) == expected  # as in transformers


def test_longrope_survives_our_own_format() -> None:
    config = replace(from_hf(BASE | {"rope_scaling": LONGROPE | ORIGINAL}), norm_plan=NormPlan.parse("peri", 2))
    assert from_hf(json.loads(json.dumps(to_hf(config, "float32")))) == config


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])  # with a head_dim of dim / heads, and of its own
def test_longrope_is_transformers_below_and_above_the_context(tmp_path: Path, model_type: str) -> None:
    theirs = random_model(model_type, 0, hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    pairs = (getattr(theirs.config, "head_dim", None) or 8) // 2
    lists = np.random.default_rng(3).uniform(1, [[3], [40]], (2, pairs)).tolist()
    rope = {"type": "longrope", "short_factor": lists[0], "long_factor": lists[1]}
    save(tmp_path / "hf", theirs, rope, max_position_embeddings=128, **ORIGINAL)
    ours = Llama.from_pretrained(tmp_path / "hf")
    ours.save_pretrained(tmp_path / "ours")
    for directory in ("hf", "ours"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / directory, attn_implementation="eager")
        for length in (32, 33, 100):
            tokens = random_tokens(1, length)
            torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)
    assert Llama.from_pretrained(tmp_path / "ours").config == ours.config
