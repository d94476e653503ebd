"""config.json <-> LlamaConfig. A key is honoured, refused by name, or known to be harmless; any other is warned of."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.files import read_json
from llama_mini.checkpoint.keys import KEYS
from llama_mini.config import LlamaConfig, RopeScaling
from llama_mini.errors import CheckpointIncompleteError, ConfigError, LlamaMiniWarning
from llama_mini.norm_plan import NormPlan

SIZES = {  # Hugging Face's word -> ours
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
}
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
ONLY = {  # settings of which one value is implemented
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}
REFUSED = {
    "quantization_config": "quantised checkpoints of this kind are not read",
    "auto_map": "code that comes with a checkpoint is never run",
}
READ = {"model_type", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"}
READ |= {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"}
HARMLESS = {"architectures", "transformers_version", "use_cache", "initializer_range", "attention_dropout"}
HARMLESS |= {"pretraining_tp", "_name_or_path", "is_llama_config", "transformers.js_config", "unsloth_fixed"}
LLAMA_DEFAULT_EPS = 1e-6  # of transformers' LlamaConfig


def read_config(directory: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """The configuration of a checkpoint directory, and config.json as it is. Raises CheckpointError, ConfigError."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointIncompleteError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint")
    raw = read_json(path)
    try:
        return from_hf(raw), raw
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """Raises ConfigError that names the key, what it holds, and what is known."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in KEYS:
        raise ConfigError(f"unknown model_type {model_type!r}; known: {', '.join(KEYS)}")
    if model_type == "llama_mini":
        return _from_own(raw)
    for key, why in REFUSED.items():
        if raw.get(key) is not None:
            raise ConfigError(f"{key}: {why}")
    for key, value in ONLY.items():
        if raw.get(key, value) != value:
            raise ConfigError(f"{key} is {raw[key]!r}; only {value!r} is implemented")
    if absent := [key for key in REQUIRED if raw.get(key) is None]:
        raise ConfigError(f"{', '.join(absent)} missing")
    if unknown := set(raw) - set(SIZES) - set(ONLY) - set(REFUSED) - READ - HARMLESS:
        _warn(f"config.json: unknown {', '.join(sorted(unknown))} ignored")
    if raw.get("rms_norm_eps") is None:
        _warn(f"config.json: rms_norm_eps is absent; {LLAMA_DEFAULT_EPS} taken, the default of model_type llama")
    sizes = {ours: raw[key] for key, ours in SIZES.items() if raw.get(key) is not None}
    try:
        theta, scaling = _rope(raw, sizes)
        return LlamaConfig(
            **sizes,
            norm_eps=LLAMA_DEFAULT_EPS if raw.get("rms_norm_eps") is None else raw["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            **_read_special_ids(raw),
        )
    except ConfigError as error:
        raise ConfigError(_in_their_words(str(error))) from None


def to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """config.json in the spelling that transformers v4 and v5 both read; our own for a plan that only we have."""
    if config.norm_plan != NormPlan.parse("pre", config.n_layers):
        own = asdict(config) | {"norm_plan": config.norm_plan.to_dict()}
        return {"model_type": "llama_mini", "dtype": dtype} | own
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        **{key: getattr(config, ours) for key, ours in SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "tie_word_embeddings": config.tie_word_embeddings,
        **special_ids(config),
    }


def special_ids(config: LlamaConfig) -> dict[str, Any]:
    """The special tokens, as config.json and generation_config.json have them."""
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}


def _rope(raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """The base and the scaling: `rope_parameters` of transformers v5, or `rope_theta` and `rope_scaling` of v4."""
    given = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None]
    if len(given) == 2 and raw[given[0]] != raw[given[1]]:
        raise ConfigError(f"rope_parameters and rope_scaling disagree: {raw[given[0]]!r} and {raw[given[1]]!r}")
    key = given[0] if given else "rope_scaling"
    found = raw[key] if given else {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{key} must be an object or null, not {found!r}")
    rest = dict(found)
    bases = [base for base in (rest.pop("rope_theta", None), raw.get("rope_theta")) if base is not None]
    if len(bases) == 2 and bases[0] != bases[1]:
        raise ConfigError(f"rope_theta is {bases[1]!r}, but {key} says {bases[0]!r}")
    theta = bases[0] if bases else 10_000.0
    kinds = [rest.pop(name) for name in ("rope_type", "type") if name in rest] or ["default"]
    if kinds[0] not in ("default", "llama3") or kinds[-1] != kinds[0]:
        raise ConfigError(f"{key}: unknown rope type {' and '.join(map(repr, kinds))}; known: default, llama3")
    original = rest.pop("original_max_position_embeddings", sizes.get("max_seq_len"))
    if kinds[0] == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        if absent := [name for name in names if name not in rest]:
            raise ConfigError(f"{key}: {', '.join(absent)} missing")
        scaling = RopeScaling(original_max_seq_len=original, **{name: rest.pop(name) for name in names})
    else:
        scaling = None
    if rest:
        raise ConfigError(f"{key}: unknown {', '.join(sorted(map(str, rest)))}")
    return theta, scaling


def _read_special_ids(raw: Mapping[str, Any]) -> dict[str, Any]:
    def ids(key: str) -> tuple[int, ...]:
        value = raw.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            raise ConfigError(f"{key} must be a token id or a list of them, not {value!r}")
        return tuple(i for i in found if i >= 0)  # -1 stands for none

    bos, pad = ids("bos_token_id"), ids("pad_token_id")
    return {"bos_id": bos[0] if bos else None, "eos_ids": ids("eos_token_id"), "pad_id": pad[0] if pad else None}


def _in_their_words(message: str) -> str:
    """A message about our fields as one about the file's keys."""
    theirs = {ours: key for key, ours in SIZES.items()} | {"norm_eps": "rms_norm_eps"}
    theirs |= {"original_max_seq_len": "original_max_position_embeddings"}
    return re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), message)


def _from_own(raw: Mapping[str, Any]) -> LlamaConfig:
    values = {key: value for key, value in raw.items() if key not in ("model_type", "dtype")}
    known = {f.name for f in fields(LlamaConfig)}
    if unknown := set(values) - known:
        raise ConfigError(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    if "norm_plan" not in values:
        raise ConfigError("norm_plan missing")
    values["norm_plan"] = NormPlan.from_dict(values["norm_plan"])
    if isinstance(values.get("eos_ids"), list):
        values["eos_ids"] = tuple(values["eos_ids"])
    try:
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    except TypeError as error:  # no object, or one with other keys
        raise ConfigError(f"rope_scaling: {error}") from None
    try:
        return LlamaConfig(**values)
    except TypeError as error:  # a field without a default is absent
        raise ConfigError(str(error)) from None


def _warn(message: str) -> None:
    warnings.warn(message, LlamaMiniWarning, stacklevel=2)
