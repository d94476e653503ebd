"""The rotary settings of a config.json: `rope_parameters` of transformers v5, `rope_theta` and `rope_scaling` of v4."""

from collections.abc import Mapping
from typing import Any

from llama_mini.errors import ConfigError
from llama_mini.model.rope_scaling import RopeScaling, yarn_magnitude
from llama_mini.validate import is_finite, join_names, short_repr

DEFAULT_THETA = 10_000.0
_KNOWN = ("default", "linear", "dynamic", "llama3", "yarn")
_CONTEXT = "original_max_position_embeddings"


def read_rope(raw: Mapping[str, Any], max_seq_len: Any) -> tuple[Any, RopeScaling | None]:
    """The base and the scaling. Raises ConfigError that names the key, its value and what is known."""
    keys = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None] or ["rope_scaling"]
    settings = [_read(raw, key, max_seq_len) for key in keys]
    if settings[0] != settings[-1]:
        raise ConfigError(
            f"rope_parameters and rope_scaling disagree: {short_repr(raw[keys[0]])} and {short_repr(raw[keys[-1]])}"
        )
    return settings[0]


def _read(raw: Mapping[str, Any], key: str, max_seq_len: Any) -> tuple[Any, RopeScaling | None]:
    settings = {} if raw.get(key) is None else raw[key]
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{key} must be an object or null, not {short_repr(settings)}")
    fields = dict(settings)
    fields.pop("finetuned", None)  # whether the model was trained with the scaling, which changes no number
    bases = [base for base in (fields.pop("rope_theta", None), raw.get("rope_theta")) if base is not None]
    if len(bases) == 2 and bases[0] != bases[1]:
        raise ConfigError(f"rope_theta is {short_repr(bases[1])}, but {key} says {short_repr(bases[0])}")
    theta = bases[0] if bases else DEFAULT_THETA
    kinds = [fields.pop(name) for name in ("rope_type", "type") if name in fields] or ["default"]
    kind = kinds[0]
    if not isinstance(kind, str) or kind not in _KNOWN or kinds[-1] != kind:
        raise ConfigError(
            f"{key}: unknown rope type {' and '.join(map(short_repr, kinds))}; known: {', '.join(_KNOWN)}"
        )
    partial = fields.pop("partial_rotary_factor", 1)
    if partial not in (None, 1):
        raise ConfigError(f"{key}: partial_rotary_factor is {short_repr(partial)}; only 1 is implemented")
    context = fields.pop(_CONTEXT, None)
    if raw.get(_CONTEXT) is not None:
        context = raw[_CONTEXT]  # the top-level key wins over the rope settings, as in transformers
    if kind == "dynamic" and context not in (None, max_seq_len):
        raise ConfigError(f"{key}: {_CONTEXT} is {short_repr(context)}, but dynamic scaling starts from {max_seq_len}")
    if kind in ("llama3", "yarn"):
        fields["original_max_seq_len"] = max_seq_len if context is None else context
    if kind == "yarn":
        _resolve_yarn(key, fields, max_seq_len)
    if kind == "default":
        if fields:
            raise ConfigError(f"{key}: unknown {join_names(sorted(map(str, fields)))}")
        return theta, None
    try:
        return theta, RopeScaling.from_dict({"rope_type": kind} | fields)
    except ConfigError as error:
        raise ConfigError(str(error).replace("rope_scaling", key, 1)) from None


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys of transformers v4, which v5 reads too."""
    data = scaling and {_CONTEXT if k == "original_max_seq_len" else k: v for k, v in scaling.to_dict().items()}
    return {"rope_theta": theta, "rope_scaling": data}


def _resolve_yarn(key: str, fields: dict[Any, Any], max_seq_len: Any) -> None:
    """Computes what transformers infers: an absent factor, and the attention factor from both `mscale` values."""
    for name in [name for name in ("factor", "attention_factor", "beta_fast", "beta_slow") if fields.get(name) is None]:
        fields.pop(name, None)
    context = fields["original_max_seq_len"]
    numbers = {name: fields.pop(name, None) for name in ("mscale", "mscale_all_dim")}
    if "factor" not in fields and is_finite(context) and context > 0 and is_finite(max_seq_len):
        fields["factor"] = max_seq_len / context
    for name, value in numbers.items():
        if value is not None and (not is_finite(value) or value < 0):
            raise ConfigError(f"{key}.{name} must be a finite number of at least 0, not {short_repr(value)}")
    if all(numbers.values()) and "attention_factor" not in fields and is_finite(fields.get("factor")):
        fields["attention_factor"] = yarn_magnitude(fields["factor"], numbers["mscale"]) / yarn_magnitude(
            fields["factor"], numbers["mscale_all_dim"]
        )
