"""adapter_config.json: each key is read, refused by name, ignored, or unknown, which is a warning."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from llama_mini.checkpoint.adapters.config import AdapterConfig, read_adapter_config
from llama_mini.errors import ConfigError, LlamaMiniError, LlamaMiniWarning

PEFT: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
MLX: dict[str, Any] = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0}}


def read(folder: Path, raw: Any) -> AdapterConfig:
    (folder / "adapter_config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return read_adapter_config(folder)


def test_scales(tmp_path: Path) -> None:
    """The factors of PEFT: alpha / r, or alpha / √r. The patterns match the end of a name, the first one wins."""
    patterns = {
        "rank_pattern": {"q_proj": 9, "layers.1.mlp.*": 16},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 2},
    }
    found = read(tmp_path, PEFT | patterns)
    q, k, up = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    assert [found.scale_of(name) for name in (q, k, up)] == [6 / 9, 6 / 4, 2 / 4]
    assert found.rank_of("model.layers.1.mlp.up_proj") == 16
    assert found.rank_of("model.layers.11.mlp.up_proj") == 4
    assert read(tmp_path, PEFT | patterns | {"use_rslora": True}).scale_of(q) == 2
    assert read(tmp_path, MLX).scale_of(q) == 10


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            PEFT | {"peft_type": "IA3"},
            "peft_type is 'IA3'; only LoRA is read; merge it into its model with PEFT's merge_",
        ),
        (PEFT | {"peft_type": 5}, "peft_type is 5; only LoRA is read"),
        ({}, "peft_type is None; only LoRA is read"),
        (
            PEFT | {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights is 'pissa_niter_16', which is not implemented",
        ),
        (PEFT | {"lora_bias": True}, "lora_bias is True, which is not implemented"),
        (PEFT | {"use_qalora": True}, "use_qalora is True"),
        (PEFT | {"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]"),
        (PEFT | {"layer_replication": [[0, 4]]}, "layer_replication is"),
        (PEFT | {"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is"),
        (PEFT | {"r": 0}, "r must be a whole number from 1 to 65536, not 0"),
        (PEFT | {"r": "8"}, "r must be a whole number"),
        (PEFT | {"lora_alpha": "8"}, "lora_alpha must be a finite number from .* not '8'"),
        (
            PEFT | {"lora_alpha": 1e12},
            r"lora_alpha must be a finite number from -1000000000\.0 to 1000000000\.0, not 1",
        ),
        (PEFT | {"use_dora": 1}, "use_dora must be true or false, not 1"),
        (PEFT | {"rank_pattern": {"q": -1}}, "a number of rank_pattern must be a whole number"),
        (PEFT | {"alpha_pattern": {"q": None}}, "a number of alpha_pattern must be a finite number"),
        (PEFT | {"alpha_pattern": ["q"]}, "alpha_pattern must be an object"),
        (PEFT | {"alpha_pattern": {"q(": 1}}, "alpha_pattern: .* is a broken pattern: missing"),
        (PEFT | {"base_model_name_or_path": 7}, "base_model_name_or_path must be a path or a hub name, not 7"),
        (PEFT | {"trainable_token_indices": [1.5]}, "trainable_token_indices must be lists of token ids"),
        (PEFT | {"trainable_token_indices": "all"}, "trainable_token_indices must be lists of token ids"),
        (MLX | {"fine_tune_type": "ia3"}, "unknown fine_tune_type 'ia3'; known: lora, dora, full"),
        (
            MLX | {"lora_parameters": {"rank": 4, "alpha": 8}},
            r"lora_parameters\.scale must be a finite number from .* not None",
        ),
        (MLX | {"lora_parameters": [4]}, r"lora_parameters must be an object, not \[4\]"),
    ],
)
def test_what_is_refused(tmp_path: Path, raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, raw)
    assert str(tmp_path / "adapter_config.json") in str(caught.value)


@pytest.mark.parametrize("raw", ["no JSON", "[]", ""])
def test_what_is_no_object(tmp_path: Path, raw: str) -> None:
    with pytest.raises(LlamaMiniError, match=r"adapter_config\.json"):
        read(tmp_path, raw)


@pytest.mark.parametrize("raw", [PEFT, MLX])
def test_unknown_keys_are_one_warning(tmp_path: Path, raw: dict[str, Any]) -> None:
    with pytest.warns(LlamaMiniWarning, match=r"adapter_config\.json: unknown new_key, other_key ignored"):
        read(tmp_path, raw | {"new_key": 1, "other_key": 2, "absent": None})


@pytest.mark.parametrize("layers", ["lora_layers", "num_layers"])
def test_alpha_of_mlx_lm(tmp_path: Path, layers: str) -> None:
    """Versions before 0.15 used it; those after 0.19, which write num_layers, do not, but wrote it for long."""
    raw = MLX | {layers: 16, "lora_parameters": MLX["lora_parameters"] | {"alpha": 16.0, "keys": ["q_proj"]}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path, raw)
    expected = ["adapter_config.json: lora_parameters: unknown alpha ignored"] if layers == "lora_layers" else []
    assert [str(warning.message) for warning in caught] == expected


LONG = ["([a-z._0-9]+)+!", "(a|a)*b", "(?:x+x+)+y", ".*.*.*.*!", "q" * 20_000, "(.){1,9}!"]


@pytest.mark.parametrize("pattern", LONG, ids=range(len(LONG)))
def test_a_pattern_that_takes_long_is_refused(tmp_path: Path, pattern: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"rank_pattern: .* repeats too much; give names or patterns with few"):
        read(tmp_path, PEFT | {"rank_pattern": {pattern: 4}})
    assert time.process_time() - started < 0.5
