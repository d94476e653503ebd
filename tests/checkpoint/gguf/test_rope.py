"""Rotary scaling in GGUF files, as llama.cpp's converter writes it, against the models they were written from."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_mini.checkpoint.gguf.model import open_gguf
from llama_mini.errors import CheckpointFormatError, ConfigError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.model.rope_scaling import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from tests.checkpoint.gguf.gguf_files import write_family
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": 48,
}
LINEAR = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}
DIVISORS = np.array([1.0, 1.5, 4.0], "f4")
LISTS = {"rope_factors_short__weight": DIVISORS, "rope_factors_long__weight": 3 * DIVISORS}


def scaling(path: Path, **metadata: Any) -> RopeScaling | None:
    return open_gguf(write_family(path, random_model("qwen3", 0, head_dim=6), **metadata)).config.rope_scaling


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_1_scaling_is_read_off_its_tensor(tmp_path: Path, factor: float) -> None:
    """With the arithmetic of llama.cpp's converter, which divides float32 frequencies, written anew."""
    theirs = random_model("llama", 3)
    theta, head_dim = theirs.config.rope_parameters["rope_theta"], theirs.config.head_dim
    plain = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    turns = 8192 * plain / (2 * np.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / (kept + (1 - kept) / factor)).astype(np.float32)
    path = write_family(tmp_path / "model", theirs, rope_freqs__weight=divisors)
    expected = Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    assert open_gguf(path).config.rope_scaling == expected


def test_divisors_of_no_known_rule_are_honoured(tmp_path: Path) -> None:
    seed = 3  # llama3, with an original context of its own
    theirs = random_model("llama", seed)
    assert theirs.config.rope_parameters["rope_type"] == "llama3"
    theta, head_dim = theirs.config.rope_parameters["rope_theta"], theirs.config.head_dim
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    divisors = (plain / theirs.model.rotary_emb.inv_freq).numpy()
    path = write_family(tmp_path / "model", theirs, rope_freqs__weight=divisors)
    model = Llama.from_pretrained(path)
    assert isinstance(model.config.rope_scaling, LongRopeScaling)
    tokens = random_tokens(1, 150)
    torch.testing.assert_close(model(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "ours")  # as longrope with two equal lists
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(logits(again, tokens), logits(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"rope__scaling__type": "su"}, "unknown rope.scaling.type 'su'; known: none, linear, yarn, longrope"),
        ({"rope__scaling__type": "longrope"}, "longrope, but rope_factors_long.weight and rope_factors_short.weight"),
        ({"rope__scaling__attn_factor": 0.5}, "rope.scaling.attn_factor is 0.5; without yarn or longrope it must be 1"),
        (LINEAR | {"rope__scaling__attn_factor": 0.5}, "rope.scaling.attn_factor is 0.5; without yarn"),
        (YARN | {"rope__scaling__attn_factor": 0.0}, "rope.scaling.attn_factor must be a finite number above 0"),
        (YARN | {"rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5; only 0 and 1 are implemented"),
        (YARN | {"rope__scaling__yarn_log_multiplier": "a"}, "yarn_log_multiplier must be a finite number"),
        (YARN | {"rope__scaling__yarn_attn_factor": "a"}, "yarn_attn_factor must be a finite number"),
        (YARN | {"rope__scaling__factor": "4"}, "rope.scaling.factor must be a finite number"),
        ({"rope__scaling__alpha": 2.0}, "rope.scaling.alpha is 2.0; this setting is not implemented"),
        (LINEAR | {"rope_freqs__weight": DIVISORS}, "rope.scaling.factor is 2, and rope_freqs.weight scales"),
        (YARN | LISTS, "rope.scaling.factor is 4, and rope_factors_long.weight scales"),
        ({"rope_freqs__weight": 2 * DIVISORS[:2]}, "rope_freqs.weight has 2 numbers; 6 rotated elements need 3"),
        (LISTS | {"rope_factors_long__weight": -DIVISORS}, r"rope_factors_long.weight\[0\] must be a finite number"),
    ],
)
def test_scaling_that_is_not_implemented_is_refused(tmp_path: Path, metadata: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        scaling(tmp_path / "model", **metadata)


def test_a_bare_factor_is_linear(tmp_path: Path) -> None:
    theirs = random_model("llama", 1)
    tokens = random_tokens(1, 60)
    for key in ("rope__scaling__factor", "rope__scale_linear"):
        path = write_family(tmp_path / key, theirs, **{key: float(theirs.config.rope_parameters["factor"])})
        torch.testing.assert_close(Llama.from_pretrained(path)(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)


def yarn(**changes: Any) -> YarnScaling:
    return YarnScaling(**{"factor": 4.0, "original_max_seq_len": 48} | changes)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"finetuned": True, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}, yarn(beta_fast=16.0, beta_slow=2.0)),
        ({"attn_factor": 0.5}, yarn(attention_factor=0.5 * (1 + 0.1 * math.log(4)))),
        ({"yarn_log_multiplier": 1.0}, yarn(attention_factor=1.0)),
        ({"yarn_log_multiplier": 0.0}, yarn()),
        ({"yarn_ext_factor": 1.0}, yarn()),
        ({"yarn_ext_factor": -1.0}, yarn()),
        ({"yarn_ext_factor": 0.0}, LinearScaling(factor=4.0)),
        ({"type": "linear", "yarn_ext_factor": 1.0}, yarn()),
        ({"type": "none"}, None),
        ({"factor": 1.0}, None),
    ],
)
def test_every_key_has_llama_cpps_arithmetic(tmp_path: Path, metadata: dict[str, Any], expected: Any) -> None:
    keys = {f"rope__scaling__{key}": value for key, value in metadata.items()}
    assert scaling(tmp_path / "model", **YARN | keys) == expected


def test_deepseeks_attn_factor_is_that_of_the_hugging_face_form(tmp_path: Path) -> None:
    """DeepSeek-R1-0528-Qwen3-8B: the converter writes attn_factor as yarn_attn_factor, which llama.cpp ignores here."""
    attn_factor = 0.8782488562869419
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "rope_theta": 1e6}
    theirs = random_model("qwen3", 0, max_position_embeddings=192, rope_parameters=rope)
    theirs.save_pretrained(tmp_path / "hf")
    path = write_family(tmp_path / "model", theirs, **YARN, rope__scaling__yarn_attn_factor=attn_factor)
    with pytest.warns(LlamaMiniWarning, match=r"yarn_attn_factor, 0\.878249, ignored .* by 1\.139$") as caught:
        ours = Llama.from_pretrained(path)
    assert len(caught) == 1
    tokens = random_tokens(1, 150)
    torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)
    torch.testing.assert_close(ours(tokens), Llama.from_pretrained(tmp_path / "hf")(tokens), rtol=0, atol=1e-6)


def test_a_yarn_attn_factor_that_agrees_is_not_mentioned(tmp_path: Path) -> None:
    """Olmo 3's attention_factor, which the converter writes there too, is the one that YaRN computes."""
    assert scaling(tmp_path / "model", **YARN, rope__scaling__yarn_attn_factor=1 + 0.1 * math.log(4)) == yarn()


def test_sections_for_images_are_ignored_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(LlamaMiniWarning, match="rope.dimension_sections ignored, since only images") as caught:
        assert scaling(tmp_path / "model", rope__dimension_sections=[1, 1, 1, 0]) is None
    assert len(caught) == 1


@pytest.mark.parametrize("kind", [{"rope__scaling__type": "longrope"}, {}])  # the first Phi-3 files have no type
def test_longrope_is_read_off_its_lists(tmp_path: Path, kind: dict[str, Any]) -> None:
    rope = {"rope_type": "longrope", "short_factor": DIVISORS.tolist(), "long_factor": (3 * DIVISORS).tolist()}
    rope |= {"original_max_position_embeddings": 48, "rope_theta": 1e4}
    theirs = random_model("llama", 0, head_dim=6, max_position_embeddings=192, rope_parameters=rope)
    attn_factor = math.sqrt(1 + math.log(4) / math.log(48))
    more = {"rope__scaling__original_context_length": 48, "rope__scaling__attn_factor": attn_factor}
    model = Llama.from_pretrained(write_family(tmp_path / "model", theirs, **kind, **more, **LISTS))
    for length in (48, 49, 100):
        tokens = random_tokens(1, length)
        torch.testing.assert_close(model(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("left", ["long", "short"])
def test_one_list_without_the_other_is_refused(tmp_path: Path, left: str) -> None:
    lists = {name: values for name, values in LISTS.items() if left in name}
    with pytest.raises(CheckpointFormatError, match=r"rope_factors_(long|short)\.weight is missing"):
        scaling(tmp_path / "model", **lists)
