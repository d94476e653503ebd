"""LlamaConfig: what it fills in, what it refuses, and that it is a value."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from llama_mini.errors import ConfigError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope_scaling import Llama3Scaling

SIZES: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 50}
SCALING: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 8192,
}
NAN, INF = float("nan"), float("inf")


def test_what_is_not_given_is_filled_in() -> None:
    config = LlamaConfig(**SIZES)
    assert (config.n_kv_heads, config.head_dim, config.max_seq_len) == (4, 16, 2048)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 10_000, None)
    assert config.norm_plan == NormPlan.parse("pre", 2)
    assert not config.tie_word_embeddings
    assert (config.bos_id, config.eos_ids, config.pad_id) == (None, (), None)


def test_heads_need_not_fill_the_stream() -> None:
    config = LlamaConfig(**SIZES | {"dim": 1792, "n_heads": 24, "n_kv_heads": 8, "head_dim": 128})
    assert (config.n_heads * config.head_dim, config.n_kv_heads) == (3072, 8)


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"])
def test_a_size_that_is_none_is_refused_by_name(name: str) -> None:
    for bad in [0, -1, 2**31, 4.0, "64", True, NAN, [64]]:
        with pytest.raises(ConfigError, match=f"^{name} must be a whole number from 1 to"):
            LlamaConfig(**SIZES | {name: bad})


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "max_seq_len"])
def test_a_size_that_is_absent_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be a whole number .*not None"):
        LlamaConfig(**SIZES | {name: None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, r"n_heads \(4\) is not a multiple of n_kv_heads \(3\)"),
        ({"n_kv_heads": 8}, r"n_heads \(4\) is not a multiple of n_kv_heads \(8\)"),
        ({"dim": 66}, r"dim \(66\) is not a multiple of n_heads \(4\); give head_dim"),
        ({"head_dim": 15}, "head_dim must be even.*found 15"),
        ({"dim": 60, "n_heads": 4}, "head_dim must be even.*found 15"),
        ({"max_seq_len": 0}, "max_seq_len must be a whole number"),
        *(({"norm_eps": bad}, "norm_eps must be a finite number") for bad in (-1e-9, NAN, INF, "1e-5", None, True)),
        *(({"rope_theta": bad}, "rope_theta must be a finite number") for bad in (0, -1.0, NAN, INF, "1", None)),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling must be a RopeScaling or None, not {'factor': 8}"),
        *(({"tie_word_embeddings": bad}, "tie_word_embeddings must be true or false") for bad in (None, 1, "true")),
        ({"norm_plan": "prenorm"}, "unknown preset 'prenorm'"),
        ({"norm_plan": None}, "norm_plan must be a NormPlan or a preset's name, not None"),
        ({"norm_plan": {}}, "norm_plan must be a NormPlan or a preset's name"),
        ({"norm_plan": NormPlan.parse("mix(.5)", 10)}, "override of layers 0-4 in a model of 2 layers"),
        ({"eos_ids": 2}, "eos_ids"),
        ({"eos_ids": [2]}, "eos_ids"),
        ({"eos_ids": ("2",)}, "eos_ids"),
        ({"bos_id": "1"}, "bos_id"),
        ({"pad_id": 1.0}, "pad_id"),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LlamaConfig(**SIZES | changes)
    assert "\n" not in str(caught.value)


NAMES = ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"]
NAMES += ["norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "norm_plan"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_of_five_thousand_digits_is_refused_in_a_short_sentence(name: str, sign: int) -> None:
    with pytest.raises(ConfigError, match=name) as caught:  # Python itself refuses to print such a number
        LlamaConfig(**SIZES | {name: sign * 10**5000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"factor": bad}, "rope_scaling.factor") for bad in (0, -8, 0.5, NAN, INF, "8", None, True)),
        *(({"low_freq_factor": bad}, "rope_scaling.low_freq_factor") for bad in (0, NAN, None, 4.0, 5.0)),
        ({"high_freq_factor": -1.0}, "rope_scaling.high_freq_factor"),
        *(({"original_max_seq_len": bad}, "rope_scaling.original_max_seq_len") for bad in (0, 8192.0, None, "8192")),
    ],
)
def test_a_rope_scaling_that_is_none_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama3Scaling(**SCALING | changes)


def test_zero_is_an_eps_and_a_whole_number_is_a_base() -> None:
    config = LlamaConfig(**SIZES | {"norm_eps": 0, "rope_theta": 500_000})
    assert (config.norm_eps, config.rope_theta) == (0, 500_000)


def test_a_config_is_a_value() -> None:
    config, twin = (LlamaConfig(**SIZES, rope_scaling=Llama3Scaling(**SCALING), eos_ids=(2,)) for _ in range(2))
    assert config == twin
    assert hash(config) == hash(twin)
    assert config != LlamaConfig(**SIZES, eos_ids=(2,))
    with pytest.raises(FrozenInstanceError):
        config.dim = 128  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        LlamaConfig(*SIZES.values())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="hidden_size"):
        LlamaConfig(**SIZES | {"hidden_size": 64})
