"""config.json <-> LlamaConfig. Each key is read, refused by name, ignored, or unknown, which is a warning."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.families import FAMILIES, KNOWN, OWN, WHOLES
from llama_mini.checkpoint.families.family import Family
from llama_mini.checkpoint.hf.layers import layer_keys, layers_to_hf, read_layers
from llama_mini.checkpoint.hf.rope import head_dim, read_rope, rope_keys, rope_to_hf
from llama_mini.checkpoint.io.files import inside, read_json
from llama_mini.checkpoint.not_models import describe_config
from llama_mini.checkpoint.quantized.methods import SETTINGS
from llama_mini.checkpoint.special_ids import read_special_ids, special_ids
from llama_mini.errors import CheckpointIncompleteError, ConfigError, errors_about, warn
from llama_mini.model.config import LlamaConfig
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.rope_scaling import RopeScaling
from llama_mini.validate import check_choice, check_number, is_whole, join_names, short_repr, warn_unknown

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
REQUIRED_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
PART_OF = "part_of"  # our key: the model_type of the model whose text part this is
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ACTIVATIONS |= {"gelu_new": "gelu_tanh", "relu2": "relu2"}
_FALSE: tuple[str, ...] = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "use_qkv_bias", "qkv_bias")
_FALSE += ("bias", "alibi", "use_qk_norm", "qk_layernorm", "use_sliding_window", "rope_interleaved")
_FALSE += ("use_parallel_residual", "use_bidirectional_attention")
_NULL: tuple[str, ...] = ("sliding_window", "sliding_window_pattern", "rope_local_base_freq", "no_rope_layers")
_NULL += ("no_rope_layer_interval", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar")
_NULL += ("attention_multiplier", "clip_qkv")
_ONE = ("partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")
# Only this value is implemented, unless the family reads the key.
FIXED_KEYS: dict[str, Any] = {**dict.fromkeys(_FALSE, False), **dict.fromkeys(_NULL), **dict.fromkeys(_ONE, 1.0)}
AUTO_MAP = "auto_map"
READ_KEYS = {PART_OF, "model_type", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"}
READ_KEYS |= {"use_mrope", "original_max_position_embeddings", "max_window_layers", "layer_types"}
READ_KEYS |= {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"}
IGNORED_KEYS = {"architectures", "transformers_version", "use_cache", "initializer_range", "attention_dropout"}
IGNORED_KEYS |= {"pretraining_tp", "_name_or_path", "is_llama_config", "transformers.js_config", "unsloth_fixed"}
IGNORED_KEYS |= {"unsloth_version", "_flash_attn_2_enabled", "max_sequence_length", "pad_token", "torchscript"}
IGNORED_KEYS |= {"temperature", "top_p", "top_k", "max_length", "do_sample", "num_beams", "repetition_penalty"}
IGNORED_KEYS |= {"_attn_implementation_autoset", "return_dict", "output_attentions", "output_hidden_states"}
IGNORED_KEYS |= {"problem_type", "cache_implementation", "_sliding_window_pattern", "eod_token_id"}
IGNORED_KEYS |= {"resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout", "hidden_dropout"}
IGNORED_KEYS |= {"num_experts", "num_local_experts", "n_routed_experts"}  # none, or else not_models.py refuses it
# Where null is a value: the number of query heads, dim / heads, no window, no cap, head_dim ** -0.5.
NULL_KEYS = {"num_key_value_heads", "head_dim", "sliding_window", "attention_multiplier"}
NULL_KEYS |= {"final_logit_softcapping", "attn_logit_softcapping"}
_SCALINGS = ("rope_scaling", "sliding_rope_scaling")


def read_config(directory: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """The configuration of a checkpoint directory, and the JSON it comes from. Raises CheckpointError, ConfigError."""
    path = inside(directory, "config.json")
    if not path.exists():
        raise CheckpointIncompleteError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint")
    raw = _text_part(read_json(path))
    with errors_about(path):
        return from_hf(raw), raw


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text part, where the model is one of images and text that is known."""
    text = raw.get("text_config")
    if raw.get("model_type") not in WHOLES or not isinstance(text, dict):
        return raw
    whole = {key: raw[key] for key in (*_OF_THE_WHOLE, *SETTINGS) if raw.get(key) is not None}
    return text | whole | {PART_OF: raw["model_type"]}  # that of the whole wins, as in transformers


def from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """A config.json as a LlamaConfig. Raises ConfigError that names the key, its value, and what is known."""
    if (what := describe_config(raw)) is not None:
        raise ConfigError(f"{what}; the model_types that can be read are {', '.join(KNOWN)}")
    check_choice("model_type", raw.get("model_type"), KNOWN, ConfigError)
    if raw["model_type"] == OWN:
        return _from_own(raw)
    family = FAMILIES[raw["model_type"]]
    table = _fields_by_key(family)
    _check_keys(raw, family, table)
    given = {key: value for key, value in raw.items() if value is not None or key in NULL_KEYS}
    settings = _defaults(raw, family) | given
    if family.eps is not None and raw.get(family.eps) is None:
        eps = family.defaults["eps"]
        warn(f"config.json: {family.eps} is absent; {eps} is used, the default of model_type {family.model_type}")
    try:
        values: dict[str, Any] = dict(family.fixed)
        for key, (names, power) in table.items():
            if key in settings:
                value = _to_field(key, settings[key], power)
                if any(values.get(name, value) != value for name in names):
                    raise ConfigError(f"{key} is {short_repr(settings[key])}, but another key says otherwise")
                values |= dict.fromkeys(names, value)
        plan = _plan(family, **{name: values.pop(name) for name in ("beta", "parallel") if name in values})
        if family.scaled_embedding and is_whole(values["dim"]) and 0 < values["dim"] < 2**31:
            values["embedding_scale"] = values["dim"] ** 0.5
        if values.get("attention_scale") == head_dim(values) ** -0.5:
            del values["attention_scale"]  # the usual one, which the fused operators know
        values |= read_layers(raw, settings, family)
        if any(raw.get(key) is not None for key in ("rope_theta", "rope_scaling", "rope_parameters")):
            settings["rope_parameters"] = raw.get("rope_parameters")
        values |= read_rope(settings, values, family)
        return LlamaConfig(**values, norm_plan=plan, **read_special_ids(raw))
    except ConfigError as error:
        raise ConfigError(_translate_keys(str(error), table)) from None


def to_hf(config: LlamaConfig, dtype: str, model_type: str | None = None) -> dict[str, Any]:
    """A config.json that transformers v4 and v5 both read.

    Its family is the first that has all the settings, and `model_type` is tried first. Without one, it is this
    project's own format.
    """
    preferred = [FAMILIES[model_type]] if model_type is not None and model_type in FAMILIES else []
    for family in [*preferred, *FAMILIES.values()]:
        raw = _to_family(config, family) | {"torch_dtype": dtype}
        with suppress(ConfigError, OverflowError):
            if from_hf(raw) == config:  # or else the family cannot express a setting
                return raw
    own = asdict(config) | {"norm_plan": config.norm_plan.to_dict()}
    for name in _SCALINGS:
        own[name] = getattr(config, name) and getattr(config, name).to_dict()
    return {"model_type": OWN, "dtype": dtype} | own


def _to_family(config: LlamaConfig, family: Family) -> dict[str, Any]:
    """The config.json of a family, as far as it can express the configuration."""
    attention = config.norm_plan.attention
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values |= {"beta": attention.beta, "parallel": config.norm_plan.parallel}
    values["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: _from_field(key, values[names[0]], power) for key, (names, power) in _fields_by_key(family).items()},
        **{key: accepted[0] for key, accepted in family.constants.items()},
        **layers_to_hf(config, family),
        **rope_to_hf(config, family),
        **special_ids(config),
    }


def _fields_by_key(family: Family) -> dict[str, tuple[tuple[str, ...], float]]:
    """The keys that the family reads -> the fields that they set, and the power of the value."""
    sizes = {key: field for key, field in SIZES.items() if field not in family.settings.values()}
    table: dict[str, str | tuple[str, float]] = {**sizes, "tie_word_embeddings": "tie_word_embeddings"}
    table |= {family.activation: "activation"} if family.activation else {}
    table |= {family.eps: "norm_eps"} if family.eps else {}
    table |= family.settings
    return {k: (tuple(v.split()), 1.0) if isinstance(v, str) else ((v[0],), v[1]) for k, v in table.items()}


def _defaults(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    acts = {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}
    sizes = dict(zip(REQUIRED_KEYS, family.sizes, strict=True)) if PART_OF in raw and family.sizes else {}
    return acts | sizes | ({family.eps: family.defaults["eps"]} if family.eps else {}) | dict(family.defaults)


def _to_field(key: str, value: Any, power: float) -> Any:
    if key in ("hidden_act", "hidden_activation"):
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ConfigError(f"{key} is {short_repr(value)}; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]
    if power == 1:
        return value
    check_number(key, value, ConfigError, above=0, maximum=10**12)
    return float(value) ** power


def _from_field(key: str, value: Any, power: float) -> Any:
    if key in ("hidden_act", "hidden_activation"):
        return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == value)
    if power == 1 or value is None:
        return value
    number = float(f"{value ** (1 / power):.15g}")  # 64, not 63.99999999999999
    return int(number) if number.is_integer() else number


def _plan(family: Family, beta: Any = 1.0, parallel: Any = None) -> NormPlan:
    """The family's norms, with settings of its config.json. A parallel layer has no norm before the feed-forward."""
    attention, feed_forward = (replace(b, beta=beta) for b in (family.norms.attention, family.norms.feed_forward))
    if parallel is None:
        parallel = family.norms.parallel
    elif parallel is True:
        feed_forward = replace(feed_forward, pre=None)
    return replace(family.norms, attention=attention, feed_forward=feed_forward, parallel=parallel)


def _check_keys(raw: Mapping[str, Any], family: Family, table: Mapping[str, Any]) -> None:
    if raw.get(AUTO_MAP):
        _check_code(raw[AUTO_MAP], family)
    read = {*table, *layer_keys(family), *rope_keys(family)}
    for key, accepted in ({key: (value,) for key, value in FIXED_KEYS.items()} | dict(family.constants)).items():
        if key not in read and raw.get(key) is not None and raw[key] not in accepted:
            values = " and ".join(map(repr, accepted))
            where = f" in model_type {family.model_type}"
            raise ConfigError(f"{key} is {short_repr(raw[key])}; only {values} is implemented{where}")
    if absent := [key for key in REQUIRED_KEYS if raw.get(key) is None and key not in _defaults(raw, family)]:
        raise ConfigError(f"{', '.join(absent)} missing")
    known = {*read, *FIXED_KEYS, *family.constants, *SETTINGS, AUTO_MAP, *READ_KEYS, *IGNORED_KEYS}
    unknown = sorted(set(raw) - known)
    if norms := [key for key in unknown if "norm" in key.lower() and raw[key] is not None]:
        raise ConfigError(f"unknown {join_names(norms)}, which may change a norm; known: {family.eps}")
    warn_unknown("config.json", unknown)


def _check_code(auto_map: Any, family: Family) -> None:
    """Refuses code that comes with a checkpoint, unless it is that of the family's own class, which is built in."""
    name = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, Mapping) else None
    own = family.architecture.replace("_", "")  # the first ERNIE 4.5 has one more
    if not isinstance(name, str) or name.rpartition(".")[2].replace("_", "") != own:
        code = "code that comes with a checkpoint is never run"
        raise ConfigError(f"{AUTO_MAP} is {short_repr(auto_map)}: {code}; give a checkpoint without it")
    warn(f"config.json: {AUTO_MAP} ignored: code that comes with a checkpoint is never run")


def _translate_keys(message: str, table: Mapping[str, tuple[tuple[str, ...], float]]) -> str:
    """A message about the fields of LlamaConfig -> one about the keys of config.json."""
    keys = {ours: key for key, (names, _) in reversed(list(table.items())) for ours in names}
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
