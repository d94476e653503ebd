"""config.json <-> LlamaConfig. Each key is read, refused by name, ignored, or unknown, which is a warning."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.families import FAMILIES, KNOWN, OWN, Family
from llama_mini.checkpoint.hf.rope import read_rope, rope_to_hf
from llama_mini.checkpoint.io.files import inside, read_json
from llama_mini.checkpoint.not_models import describe_config
from llama_mini.checkpoint.quantized.methods import SETTINGS
from llama_mini.checkpoint.special_ids import read_special_ids, special_ids
from llama_mini.errors import CheckpointIncompleteError, ConfigError, warn
from llama_mini.model.config import LlamaConfig
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope_scaling import RopeScaling
from llama_mini.validate import check_choice, check_flag, is_whole, join_names, short_repr

SIZES = {  # Hugging Face's name -> ours
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
}
REQUIRED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
FIXED_KEYS: dict[str, Any] = {  # only this value is implemented, unless the family reads the key
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
AUTO_MAP = "auto_map"
READ_KEYS = {"model_type", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"}
READ_KEYS |= {"use_mrope", "original_max_position_embeddings", "max_window_layers", "layer_types"}
READ_KEYS |= {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"}
IGNORED_KEYS = {"architectures", "transformers_version", "use_cache", "initializer_range", "attention_dropout"}
IGNORED_KEYS |= {"pretraining_tp", "_name_or_path", "is_llama_config", "transformers.js_config", "unsloth_fixed"}
IGNORED_KEYS |= {"unsloth_version", "_flash_attn_2_enabled", "max_sequence_length", "pad_token", "torchscript"}
IGNORED_KEYS |= {"temperature", "top_p", "top_k", "max_length", "do_sample", "num_beams", "repetition_penalty"}
IGNORED_KEYS |= {"_attn_implementation_autoset", "return_dict", "output_attentions", "output_hidden_states"}
IGNORED_KEYS |= {"problem_type"}
_SCALINGS = ("rope_scaling", "sliding_rope_scaling")
FULL, SLIDING = "full_attention", "sliding_attention"


def read_config(directory: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """The configuration of a checkpoint directory, and the JSON it comes from. Raises CheckpointError, ConfigError."""
    path = inside(directory, "config.json")
    if not path.exists():
        raise CheckpointIncompleteError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint")
    raw = read_json(path)
    try:
        return from_hf(raw), raw
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """A config.json as a LlamaConfig. Raises ConfigError that names the key, its value, and what is known."""
    if (what := describe_config(raw)) is not None:
        raise ConfigError(f"{what}; the model_types that can be read are {', '.join(KNOWN)}")
    check_choice("model_type", raw.get("model_type"), KNOWN, ConfigError)
    if raw["model_type"] == OWN:
        return _from_own(raw)
    family = FAMILIES[raw["model_type"]]
    _check_keys(raw, family)
    settings = {**family.defaults, **{key: value for key, value in raw.items() if value is not None}}
    for key in ("num_key_value_heads", "head_dim", "sliding_window"):
        if key in raw and raw[key] is None:  # null: the number of query heads, dim / heads, no window
            settings.pop(key, None)
    if raw.get("rms_norm_eps") is None:
        eps = family.defaults["rms_norm_eps"]
        warn(f"config.json: rms_norm_eps is absent; {eps} is used, the default of model_type {family.model_type}")
    sizes = {ours: settings[key] for key, ours in SIZES.items() if key in settings}
    try:
        theta, scaling = read_rope(raw, sizes["max_seq_len"])
        window, layers = _window(raw, settings, family)
        return LlamaConfig(
            **sizes,
            norm_eps=settings["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=window,
            sliding_layers=layers,
            **_biases(settings, family),
            tie_word_embeddings=settings.get("tie_word_embeddings", False),
            norm_plan=family.norm_plan(1),
            **read_special_ids(raw),
        )
    except ConfigError as error:
        raise ConfigError(_translate_keys(str(error))) from None


def to_hf(config: LlamaConfig, dtype: str, model_type: str | None = None) -> dict[str, Any]:
    """A config.json that transformers v4 and v5 both read.

    Its family is the first that has all the settings, and `model_type` is tried first. Without one, it is this
    project's own format.
    """
    preferred = [FAMILIES[model_type]] if model_type in FAMILIES else []
    for family in [*preferred, *FAMILIES.values()]:
        if (settings := _family_settings(config, family)) is not None:
            return {
                "architectures": [family.architecture],
                "model_type": family.model_type,
                "torch_dtype": dtype,
                **{key: getattr(config, ours) for key, ours in SIZES.items()},
                "hidden_act": "silu",
                "rms_norm_eps": config.norm_eps,
                **settings,
                "tie_word_embeddings": config.tie_word_embeddings,
                **special_ids(config),
            }
    own = asdict(config) | {"norm_plan": config.norm_plan.to_dict()}
    for name in _SCALINGS:
        own[name] = getattr(config, name) and getattr(config, name).to_dict()
    return {"model_type": OWN, "dtype": dtype} | own


def _check_keys(raw: Mapping[str, Any], family: Family) -> None:
    if raw.get(AUTO_MAP):
        code = "code that comes with a checkpoint is never run"
        raise ConfigError(f"{AUTO_MAP} is {short_repr(raw[AUTO_MAP])}: {code}; give a checkpoint without it")
    read_by_family = {
        "attention_bias": family.biases != "none",  # `qkv` accepts the key and ignores it, as transformers does
        "mlp_bias": family.biases == "attention+mlp",
        "sliding_window": family.window != "none",
        "use_sliding_window": family.window == "listed",
    }
    for key, value in FIXED_KEYS.items():
        if not read_by_family.get(key) and raw.get(key) not in (value, None):
            where = f" in model_type {family.model_type}" if key in read_by_family else ""
            if key == "hidden_act" and raw[key] == "swish":  # another name of silu
                continue
            raise ConfigError(f"{key} is {short_repr(raw[key])}; only {value!r} is implemented{where}")
    if absent := [key for key in REQUIRED_KEYS if raw.get(key) is None]:
        raise ConfigError(f"{', '.join(absent)} missing")
    unknown = sorted(set(raw) - {*SIZES, *FIXED_KEYS, *SETTINGS, AUTO_MAP, *READ_KEYS, *IGNORED_KEYS})
    if norms := [key for key in unknown if "norm" in key.lower() and raw[key] is not None]:
        raise ConfigError(f"unknown {join_names(norms)}, which may change a norm; known: rms_norm_eps")
    if unknown:
        warn(f"config.json: unknown {join_names(unknown)} ignored")


def _biases(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    if family.biases == "qkv":
        return {"qkv_bias": True}
    attention = settings.get("attention_bias", False) if family.biases != "none" else False
    check_flag("attention_bias", attention, ConfigError)
    mlp = settings.get("mlp_bias", False) if family.biases == "attention+mlp" else False
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


def _window(raw: Mapping[str, Any], settings: Mapping[str, Any], family: Family) -> tuple[Any, Any]:
    """The sliding window, in tokens, and the layers that have it."""
    n_layers, types = settings["num_hidden_layers"], raw.get("layer_types")
    if not is_whole(n_layers) or n_layers > 10_000:  # LlamaConfig refuses it
        return None, None
    window = settings.get("sliding_window")
    if family.window == "none" or (family.window == "listed" and not settings.get("use_sliding_window", False)):
        window = None
    last = settings.get("max_window_layers", 0) if family.window == "listed" else 0
    if not is_whole(last):
        raise ConfigError(f"max_window_layers must be a whole number, not {short_repr(last)}")
    layers = tuple(range(max(last, 0), n_layers)) if window is not None else ()
    if types is not None:
        if not isinstance(types, list) or len(types) != n_layers or not all(t in (FULL, SLIDING) for t in types):
            raise ConfigError(
                f"layer_types must list {FULL} or {SLIDING} for each of {n_layers} layers, not {short_repr(types)}"
            )
        sliding = tuple(i for i, kind in enumerate(types) if kind == SLIDING)
        if sliding != layers and (family.window != "listed" or window is None):
            raise ConfigError(
                f"layer_types has {len(sliding)} layers of {SLIDING}, but the other keys give a window to {len(layers)}"
            )
        layers = sliding
    return (window, layers) if layers else (None, None)


def _family_settings(config: LlamaConfig, family: Family) -> dict[str, Any] | None:
    """The other keys of the family's config.json, without sizes and ids; None if the family cannot express `config`."""
    biases = (config.qkv_bias, config.o_bias, config.mlp_bias)
    possible = {
        "attention": [(False, False, False), (True, True, False)],
        "attention+mlp": [(b, b, mlp) for b in (False, True) for mlp in (False, True)],
        "none": [(False, False, False)],
        "qkv": [(True, False, False)],
    }[family.biases]
    every = config.sliding_layers == tuple(range(config.n_layers))
    windowed = config.sliding_window is not None
    if (
        config.norm_plan != family.norm_plan(config.n_layers)
        or biases not in possible
        or (windowed and (family.window == "none" or (family.window == "every" and not every)))
    ):
        return None
    settings = rope_to_hf(config.rope_theta, config.rope_scaling)
    if family.biases.startswith("attention"):
        settings["attention_bias"] = config.qkv_bias
    if family.biases == "attention+mlp":
        settings["mlp_bias"] = config.mlp_bias
    if family.window != "none":
        settings["sliding_window"] = config.sliding_window
    if family.window == "listed":
        kinds = [SLIDING if i in config.sliding_layers else FULL for i in range(config.n_layers)]
        settings |= {"use_sliding_window": windowed, "layer_types": kinds}
    return settings


def _translate_keys(message: str) -> str:
    """A message about the fields of LlamaConfig -> one about the keys of config.json."""
    keys = {ours: key for key, ours in SIZES.items()} | {"norm_eps": "rms_norm_eps"}
    keys |= {"original_max_seq_len": "original_max_position_embeddings"}
    return re.sub(r"\w+", lambda word: keys.get(word[0], word[0]), message)


def _from_own(raw: Mapping[str, Any]) -> LlamaConfig:
    """Reads the config.json of this project's own format."""
    values = {key: value for key, value in raw.items() if key not in ("model_type", "dtype")}
    known = {f.name for f in fields(LlamaConfig)}
    if unknown := set(values) - known:
        raise ConfigError(f"unknown {join_names(sorted(unknown))}; known: {', '.join(sorted(known))}")
    if "norm_plan" not in values:
        raise ConfigError("norm_plan missing")
    values["norm_plan"] = NormPlan.from_dict(values["norm_plan"])
    for name in ("eos_ids", "sliding_layers", "unrotated_layers"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    for name in _SCALINGS:
        if values.get(name) is not None:
            values[name] = RopeScaling.from_dict(values[name])
    try:
        return LlamaConfig(**values)
    except TypeError as error:  # a field without a default is absent
        raise ConfigError(str(error)) from None
