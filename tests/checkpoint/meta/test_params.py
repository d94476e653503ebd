"""Meta's params.json: the sizes and settings of its own releases, what they leave open, and bad ones by name."""

import warnings
from typing import Any

import pytest

from llama_mini.checkpoint.meta.params import from_params
from llama_mini.errors import ConfigError, LlamaMiniWarning
from tests.checkpoint.meta.test_directory import PARAMS

RELEASES = {
    "LLaMA 1 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
        {"hidden_dim": 11008, "n_kv_heads": 32, "max_seq_len": 2048, "rope_theta": 10_000.0, "vocab_size": 32_000},
    ),
    "LLaMA 2 70B": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}
        | {"norm_eps": 1e-05, "vocab_size": -1},
        {"hidden_dim": 28672, "n_kv_heads": 8, "max_seq_len": 4096, "vocab_size": 32_000},
    ),
    "LLaMA 3 8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
        | {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0},
        {"hidden_dim": 14336, "max_seq_len": 8192, "rope_scaling": None, "vocab_size": 128256},
    ),
    "LLaMA 3.2 1B": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256}
        | {"ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        {"hidden_dim": 8192, "max_seq_len": 131_072, "head_dim": 64},
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_published_shapes_come_out(release: str) -> None:
    raw, expected = RELEASES[release]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = from_params(raw, {"output.weight": (32_000, 4096)})
    assert {key: getattr(config, key) for key in expected} == expected
    assert "max_seq_len" in str(caught[0].message)  # what Meta's file does not state is said


@pytest.mark.parametrize(("sizes", "factor"), [((4096, 32), 8.0), ((2048, 16), 32.0), ((3072, 28), 32.0)])
def test_scaled_rope_has_the_factor_of_its_release(sizes: tuple[int, int], factor: float) -> None:
    raw = {"dim": sizes[0], "n_layers": sizes[1], "n_heads": 32, "use_scaled_rope": True, "rope_theta": 5e5}
    raw |= {"vocab_size": 9, "norm_eps": 1e-5, "max_seq_len": 4096}
    with pytest.warns(LlamaMiniWarning, match=f"rope_scaling_factor; {factor:g} is assumed"):
        scaling = from_params(raw, {}).rope_scaling
    assert scaling is not None
    assert scaling.to_dict() == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_seq_len": 8192,
    }
    assert from_params(raw | {"rope_scaling_factor": 4.0}, {}).rope_scaling.factor == 4.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": None}, "dim missing"),
        ({"dim": "4096"}, "hidden_dim cannot be computed from dim '4096'"),
        ({"dim": 10**308}, "hidden_dim cannot be computed from dim a number of 1024 bits"),
        ({"ffn_dim_multiplier": 1e299}, r"ffn_dim_multiplier 1e\+299"),
        ({"multiple_of": 0}, "multiple_of 0"),
        ({"moe": {"num_experts": 8}}, "moe is .*not implemented"),
        ({"vision_chunk_size": 5}, "vision_chunk_size is 5; this is not implemented"),
        ({"quantization_args": {"scheme": "int8"}}, "quantization_args is"),
        ({"yarn": {"factor": 4, "apply_scale": False}}, "yarn is .*not implemented"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling is .*not implemented"),
        ({"use_biases": True}, "use_biases is True; only False"),
        ({"use_scaled_rope": "false"}, "use_scaled_rope must be true or false, not 'false'"),
        ({"qk_norm": True}, "unknown qk_norm, which may change a norm; known: norm_eps"),
        ({"n_kv_heads": 3}, "not a multiple of n_kv_heads"),
        ({"norm_eps": -1.0}, "norm_eps must be"),
        ({"sliding_window": 0}, "sliding_window must be"),
    ],
)
def test_bad_params_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        from_params(PARAMS | changes, {"output.weight": (96, 48)})


def test_a_size_that_is_no_number_is_named_where_a_factor_is_assumed() -> None:
    raw = PARAMS | {"dim": [48], "hidden_dim": 72, "use_scaled_rope": True}
    with pytest.raises(ConfigError, match=r"dim must be .*, not \[48\]"), pytest.warns(match="rope_scaling_factor"):
        from_params(raw, {"output.weight": (96, 48)})


def test_unknown_params_are_one_warning_and_an_open_vocabulary_needs_a_head() -> None:
    with pytest.warns(LlamaMiniWarning, match="unknown aardvark, zebra ignored"):
        from_params(PARAMS | {"zebra": 1, "aardvark": 2}, {"output.weight": (96, 48)})
    with pytest.raises(ConfigError, match=r"vocab_size is -1, and there is no output\.weight"):
        from_params(PARAMS, {})
