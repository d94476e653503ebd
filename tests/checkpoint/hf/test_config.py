"""config.json: every spelling that transformers writes, and a sentence with the key for everything else."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig as HFConfig

from llama_mini.checkpoint.hf.config import from_hf, read_config, to_hf
from llama_mini.errors import CheckpointError, ConfigError, LlamaMiniWarning
from llama_mini.model.config import LlamaConfig
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from llama_mini.model.rope_scaling import Llama3Scaling, RopeScaling
from tests.tiny_models import HF_TINY, TINY

BASE: dict[str, Any] = {"model_type": "llama"} | HF_TINY
SCALE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ORIGINAL = {"original_max_position_embeddings": 64}
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)


def test_the_sizes_have_our_names() -> None:
    config = from_hf(BASE | {"head_dim": 10, "eos_token_id": [0, 7], "bos_token_id": 0, "pad_token_id": -1})
    assert config == LlamaConfig(
        dim=48,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        head_dim=10,
        hidden_dim=80,
        vocab_size=97,
        max_seq_len=128,
        norm_eps=1e-5,
        bos_id=0,
        eos_ids=(0, 7),
    )


@pytest.mark.parametrize(
    ("spelling", "theta", "scaling"),
    [
        ({}, 10_000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | SCALE}, 5e5, SCALING),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | SCALE}, 5e5, SCALING),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "type": "llama3"} | SCALE}, 5e5, SCALING),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"} | SCALE}, 5e5, SCALING),
    ],
)
def test_rope_is_the_same_in_every_spelling(spelling: Any, theta: float, scaling: RopeScaling | None) -> None:
    config = from_hf(BASE | spelling)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    theirs: Any = HFConfig(**HF_TINY | json.loads(json.dumps(spelling))).rope_parameters
    assert theirs["rope_theta"] == theta
    assert theirs["rope_type"] == ("llama3" if scaling else "default")


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 10, "eos_token_id": [3, 4]}])
def test_what_transformers_writes_is_read_without_a_warning(changes: dict[str, Any]) -> None:
    theirs = HFConfig(**HF_TINY | changes)
    config = from_hf(json.loads(theirs.to_json_string()))
    assert config.tie_word_embeddings is theirs.tie_word_embeddings
    assert config.head_dim == theirs.head_dim
    assert list(config.eos_ids) == (theirs.eos_token_id if changes else [theirs.eos_token_id])


def test_unknown_keys_are_one_warning_that_names_them() -> None:
    with pytest.warns(LlamaMiniWarning, match="unknown aardvark, zebra") as caught:
        from_hf(BASE | {"zebra": 1, "aardvark": None})
    assert len(caught) == 1


@pytest.mark.parametrize("absent", [{}, {"rms_norm_eps": None}])
def test_an_absent_eps_is_transformers_default_with_a_warning(absent: dict[str, Any]) -> None:
    raw = {key: value for key, value in BASE.items() if key != "rms_norm_eps"} | absent
    with pytest.warns(LlamaMiniWarning, match="rms_norm_eps is absent; 1e-06"):
        assert from_hf(raw).norm_eps == HFConfig().rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; known: llama"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; known: silu, swish, gelu,"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false, not 'yes'"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false, not 1"),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias is True; only False is .* model_type mistral",
        ),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is True; only False is implemented in model_type qwen3"),
        ({"sliding_window": 4096}, "sliding_window is 4096; only None is implemented in model_type llama"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be .* not 0"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "layer_types has 2 sliding_attention, but"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types must list full_attention or sliding_attention for each of 2 layers",
        ),
        ({"use_qk_norm": True}, "use_qk_norm is True; only False is implemented"),
        ({"post_norm": False}, "unknown post_norm, which may change a norm; known: rms_norm_eps"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; only None"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0; only 1.0"),
        ({"rope_theta": 2**64, "rope_scaling": {"type": "linear", "factor": 2**64}}, "factor must be"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers must be a whole number from 1 to 10000"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is .*never run"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear: factor missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor must be a finite number from 1 to 1000000000000, not 0.5",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast must be at least beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "a"}}, "mscale must be a finite number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0} | ORIGINAL}, "dynamic scaling starts from 128"),
        ({"rope_scaling": {"type": "default", "rope_type": "llama3"} | SCALE}, "rope type"),
        ({"rope_scaling": {"rope_type": 5}}, "rope type 5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object or null, not 'llama3'"),
        ({"rope_parameters": []}, "rope_parameters must be an object or null"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them"),
        ({"bos_token_id": True}, "bos_token_id must be a token id"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hf(BASE | changes)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_an_absent_size_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} missing"):
        from_hf({name: value for name, value in BASE.items() if name != key})


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("hidden_size", 0),
        ("num_hidden_layers", -1),
        ("num_attention_heads", "6"),
        ("num_key_value_heads", 4),
        ("intermediate_size", 80.0),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", "1e-5"),
    ],
)
def test_a_bad_value_is_refused_with_the_files_key(tmp_path: Path, key: str, bad: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {key: bad}))
    with pytest.raises(ConfigError, match=key) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "rope_theta"])
def test_a_number_of_thousands_of_digits_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {key: 10**4000}))
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 250


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": SCALING, "norm_eps": 1e-6},
        {"bos_id": 0, "eos_ids": (0,), "pad_id": 0},  # SmolLM2's <|endoftext|> has the id 0
        {"bos_id": 1, "eos_ids": (2, 3, 0)},
        {"n_heads": 4, "head_dim": 18},
        {"norm_plan": "lns+qk:full-final", "rope_scaling": SCALING, "eos_ids": (0, 5)},
        {"norm_plan": NormPlan(attention=BranchPlan(post=NormSpec(eps=0.1, gain="1+w"), alpha=1.5))},
        {"norm_plan": NormPlan(attention=BranchPlan(pre=NormSpec(eps=1e-5)), feed_forward=BranchPlan(pre=NormSpec()))},
    ],
    ids=["plain", "scaled", "zero", "eos", "wide heads", "own", "own settings", "own eps"],
)
def test_a_config_survives_its_file(changes: dict[str, Any]) -> None:
    config = LlamaConfig(**TINY | changes)
    raw = json.loads(json.dumps(to_hf(config, "float32")))
    assert from_hf(raw) == config
    assert raw["model_type"] == ("llama_mini" if "norm_plan" in changes else "llama")
    if raw["model_type"] == "llama":
        theirs: Any = HFConfig.from_dict(raw)
        eos = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
        assert tuple(i for i in eos if i is not None) == config.eos_ids
        assert (theirs.bos_token_id, theirs.pad_token_id) == (config.bos_id, config.pad_id)
        assert (theirs.rms_norm_eps, theirs.head_dim) == (config.norm_eps, config.head_dim)
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 5}, "unknown hidden_size"),
        ({"norm_plan": {"attention": {"before": {}}}}, "unknown before"),
        ({"norm_plan": None}, "norm plan"),
        ({"norm_plan": "pre"}, "norm plan"),
        ({"dim": "48"}, "dim must be"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"factor": 8.0}}, "unknown rope type None"),
        ({"sliding_window": 4, "sliding_layers": [7]}, "sliding_layers must be"),
        ({"rope_scaling": 8.0}, "rope_scaling"),
        ({"eos_ids": 5}, "eos_ids"),
    ],
)
def test_our_own_config_is_held_to_the_same(changes: dict[str, Any], message: str) -> None:
    raw = json.loads(json.dumps(to_hf(LlamaConfig(**TINY | {"norm_plan": "sub"}), "float32")))
    with pytest.raises(ConfigError, match=message):
        from_hf(raw | changes)


def test_an_absent_field_of_our_own_config_is_named() -> None:
    raw = to_hf(LlamaConfig(**TINY | {"norm_plan": "sub"}), "float32")
    for key in ("norm_plan", "dim"):
        with pytest.raises(ConfigError, match=key):
            from_hf({name: value for name, value in raw.items() if name != key})


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no config.json"):
        read_config(tmp_path)
