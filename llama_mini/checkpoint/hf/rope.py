"""The rotary settings of a config.json: `rope_parameters` of transformers v5, `rope_theta` and `rope_scaling` of v4."""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from llama_mini.errors import ConfigError, warn
from llama_mini.model.rope_scaling import RULES, RopeScaling, YarnScaling, yarn_magnitude
from llama_mini.validate import check_number, check_whole, join_names, short_repr

DEFAULT_THETA = 10_000.0
_RULES = {rule.rope_type: rule for rule in RULES}
_KNOWN = ("default", *_RULES)
_OTHER_NAMES = {"su": "longrope", "mrope": "default"}  # of the first Phi-3, and of Qwen2-VL
_CONTEXT = "original_max_position_embeddings"
_INFERRED = {"yarn": {"mscale", "mscale_all_dim"}, "longrope": {"factor"}}  # keys that give the attention factor
_NO_EFFECT = {"finetuned"}  # whether the model was trained with the scaling
_MULTIMODAL = {"mrope_section", "mrope_interleaved", "use_mrope"}  # text has the same angles without them


def read_rope(raw: Mapping[str, Any], max_seq_len: Any) -> tuple[Any, RopeScaling | None]:
    """The base and the scaling. Unknown keys are one warning.

    Raises ConfigError that names the key, its value and what is known.
    """
    keys = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None] or ["rope_scaling"]
    settings = [_read(raw, key, max_seq_len) for key in keys]
    if settings[0][:2] != settings[-1][:2]:
        raise ConfigError(
            f"rope_parameters and rope_scaling disagree: {short_repr(raw[keys[0]])} and {short_repr(raw[keys[-1]])}"
        )
    theta, scaling, unread = settings[0]
    _warn_of_ignored(keys[0], [*unread, *(["use_mrope"] if raw.get("use_mrope") else [])], scaling)
    return theta, scaling


def _read(raw: Mapping[str, Any], key: str, max_seq_len: Any) -> tuple[Any, RopeScaling | None, dict[str, Any]]:
    """The base, the scaling, and the settings that neither uses."""
    if not isinstance(raw.get(key, {}), Mapping | None):
        raise ConfigError(f"{key} must be an object or null, not {short_repr(raw[key])}")
    settings = {str(name): value for name, value in (raw.get(key) or {}).items() if value is not None}
    bases = [base for base in (settings.pop("rope_theta", None), raw.get("rope_theta")) if base is not None]
    if len(bases) == 2 and bases[0] != bases[1]:
        raise ConfigError(f"rope_theta is {short_repr(bases[1])}, but {key} says {short_repr(bases[0])}")
    theta = bases[0] if bases else DEFAULT_THETA
    kind = _rope_type(key, settings)
    partial = settings.pop("partial_rotary_factor", 1)
    if partial != 1:
        raise ConfigError(f"{key}: partial_rotary_factor is {short_repr(partial)}; only 1 is implemented")
    context = settings.pop(_CONTEXT, None)
    if raw.get(_CONTEXT) is not None:
        context = raw[_CONTEXT]  # the top-level key wins over the rope settings, as in transformers
    if isinstance(context, float) and context.is_integer():
        context = int(context)
    if kind == "dynamic" and context not in (None, max_seq_len):
        raise ConfigError(f"{key}: {_CONTEXT} is {short_repr(context)}, but dynamic scaling starts from {max_seq_len}")
    names = {f.name for f in fields(_RULES[kind])} | _INFERRED.get(kind, set()) if kind != "default" else set()
    used = {name: settings.pop(name) for name in names & settings.keys() - {"original_max_seq_len"}}
    if layers := [name for name, value in settings.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"{key}: {join_names(layers)} has settings of its own; only one for all layers is implemented"
        )
    if kind == "default":
        return theta, None, settings
    if "original_max_seq_len" in names:
        used["original_max_seq_len"] = max_seq_len if context is None else context
    if kind in _INFERRED:
        _infer_attention_factor(key, kind, used, max_seq_len)
    try:
        return theta, RopeScaling.from_dict({"rope_type": kind} | used), settings
    except ConfigError as error:
        raise ConfigError(str(error).replace("rope_scaling", key, 1)) from None


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys of transformers v4, which v5 reads too."""
    data = scaling and {_CONTEXT if k == "original_max_seq_len" else k: v for k, v in scaling.to_dict().items()}
    return {"rope_theta": theta, "rope_scaling": data}


def _rope_type(key: str, settings: dict[str, Any]) -> str:
    """Takes the type out of the settings, under either name."""
    given = [settings.pop(name) for name in ("rope_type", "type") if name in settings]
    if not given and "factor" in settings:
        raise ConfigError(f"{key} has a factor but no rope_type; known: {', '.join(_KNOWN)}")
    kinds = [_OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in given] or ["default"]
    if kinds[0] not in _KNOWN or kinds[-1] != kinds[0]:
        raise ConfigError(
            f"{key}: unknown rope type {' and '.join(map(short_repr, given))}; known: {', '.join(_KNOWN)}"
        )
    return str(kinds[0])


def _infer_attention_factor(key: str, kind: str, used: dict[str, Any], max_seq_len: Any) -> None:
    """Computes what transformers infers: an absent factor from the two contexts, and from it the attention factor."""
    context = used["original_max_seq_len"]
    check_whole("max_position_embeddings", max_seq_len, ConfigError, 1, 10**12)
    check_whole(f"{key}.{_CONTEXT}", context, ConfigError, 2, 10**12)
    factor = used.setdefault("factor", max_seq_len / context)
    check_number(f"{key}.factor", factor, ConfigError, 1 if kind == "yarn" else 0, 10**12)
    scales = {name: used.pop(name) for name in ("mscale", "mscale_all_dim") if name in used}
    for name, value in scales.items():
        check_number(f"{key}.{name}", value, ConfigError, 0, 10**12)
    if kind == "longrope":
        del used["factor"]
        used.setdefault("attention_factor", math.sqrt(1 + math.log(max(factor, 1)) / math.log(context)))
    elif len(scales) == 2 and all(scales.values()):
        numerator, denominator = (yarn_magnitude(factor, scale) for scale in scales.values())
        used.setdefault("attention_factor", numerator / denominator)


def _warn_of_ignored(key: str, unread: Collection[str], scaling: RopeScaling | None) -> None:
    unknown, notes = set(unread) - _NO_EFFECT, []
    if multimodal := unknown & _MULTIMODAL:
        notes.append(f"{join_names(sorted(multimodal))} ignored, since only images and videos need it")
    if "attn_factor" in unknown and isinstance(scaling, YarnScaling):  # DeepSeek-R1-0528-Qwen3-8B has it
        unknown.discard("attn_factor")
        if scaling.attention_factor is None:
            notes.append(
                f"attn_factor ignored, as in transformers: cosines and sines are scaled by {scaling.magnitude:.4g}; "
                "vLLM scales them by attn_factor too: for its result, write the product as attention_factor"
            )
    if unknown := unknown - _MULTIMODAL:
        notes.append(f"unknown {join_names(sorted(unknown))} ignored")
    if notes:
        warn(f"config.json: {key}: {'; '.join(notes)}")
