"""The rotary settings of a config.json: `rope_parameters` of transformers v5, `rope_theta` and `rope_scaling` of v4."""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from llama_mini.checkpoint.families.family import Family
from llama_mini.checkpoint.hf.layers import FULL, SLIDING
from llama_mini.errors import ConfigError, warn
from llama_mini.model.config import LlamaConfig
from llama_mini.model.rope_scaling import RULES, LongRopeScaling, RopeScaling, YarnScaling, yarn_magnitude
from llama_mini.validate import check_number, check_whole, is_whole, join_names, short_repr

_RULES = {rule.rope_type: rule for rule in RULES}
_OTHER_NAMES = {"su": "longrope", "mrope": "default"}  # of the first Phi-3, and of Qwen2-VL
_CONTEXT = "original_max_position_embeddings"
_INFERRED = {"yarn": {"mscale", "mscale_all_dim"}, "longrope": {"factor"}}  # keys that give the attention factor
_NO_EFFECT = {"finetuned", "max_position_embeddings"}  # trained with the scaling or not; Ministral 3's copy
_Q_GROWTH = "llama_4_scaling_beta"
_MULTIMODAL = {"mrope_section", "mrope_interleaved", "use_mrope"}  # text has the same angles without them


def rope_keys(family: Family) -> set[str]:
    """The keys of config.json that this file reads for this family only."""
    share = {"partial_rotary_factor"} if family.partial is not None else set[str]()
    return share | ({"rope_local_base_freq"} if family.two_ropes else set())


def read_rope(raw: Mapping[str, Any], sizes: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of LlamaConfig; `sizes` are fields that are known. Unknown keys are one warning.

    Raises ConfigError that names the key, its value and what is known.
    """
    if not family.two_ropes:
        return _read_rope(raw, sizes, family, family.theta)
    full: Any = raw.get("rope_parameters")
    sliding: Any = {}
    if isinstance(full, Mapping) and full and full.keys() <= {FULL, SLIDING}:
        full, sliding = full.get(FULL) or {}, full.get(SLIDING) or {}
    found = _read_rope({**raw, "rope_parameters": full}, sizes, family, family.theta)
    base = found["rope_theta"] if family.sliding_theta is None else family.sliding_theta
    stated = {"rope_parameters": sliding, "rope_theta": raw.get("rope_local_base_freq")}
    theta, scaling, *_ = _read_rope(stated, sizes, family, base).values()
    if not sizes.get("sliding_layers") or (theta, scaling) == (found["rope_theta"], found["rope_scaling"]):
        return found
    return found | {"sliding_rope_theta": theta, "sliding_rope_scaling": scaling}


def _read_rope(raw: Mapping[str, Any], sizes: Mapping[str, Any], family: Family, base: float) -> dict[str, Any]:
    keys = [key for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None] or ["rope_scaling"]
    settings = [_read(raw, key, sizes, family, base) for key in keys]
    if settings[0][0] != settings[-1][0]:
        both = " and ".join(short_repr(raw[key]) for key in keys)
        raise ConfigError(f"rope_parameters and rope_scaling disagree: {both}")
    found, unread = settings[0]
    _warn_of_ignored(keys[0], [*unread, *(["use_mrope"] if raw.get("use_mrope") else [])], found["rope_scaling"])
    return found


def _read(
    raw: Mapping[str, Any], key: str, sizes: Mapping[str, Any], family: Family, base: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields: base, scaling and what is rotated; and the settings that they do not use."""
    if not isinstance(raw.get(key, {}), Mapping | None):
        raise ConfigError(f"{key} must be an object or null, not {short_repr(raw[key])}")
    max_seq_len = sizes.get("max_seq_len")
    settings = {str(name): value for name, value in (raw.get(key) or {}).items() if value is not None}
    bases = [theta for theta in (settings.pop("rope_theta", None), raw.get("rope_theta")) if theta is not None]
    if len(bases) == 2 and bases[0] != bases[1]:
        raise ConfigError(f"rope_theta is {short_repr(bases[1])}, but {key} says {short_repr(bases[0])}")
    found: dict[str, Any] = {"rope_theta": bases[0] if bases else base, "rope_scaling": None}
    kind = _rope_type(key, settings, family)
    share = settings.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    found |= _rotary_dim(key, share, sizes, family)
    own = settings.pop(_CONTEXT, None)
    # The top-level key wins over the rope settings, as in transformers.
    context = own if raw.get(_CONTEXT) is None else raw[_CONTEXT]
    if isinstance(context, float) and context.is_integer():
        context = int(context)
    if context is not None:
        check_whole(f"{key}.{_CONTEXT}" if raw.get(_CONTEXT) is None else _CONTEXT, context, ConfigError, 1, 10**12)
    if kind == "dynamic" and family.fixed_alpha and "alpha" in settings:
        check_number(f"{key}.alpha", settings["alpha"], ConfigError, above=0, maximum=10**12)
        check_number("rope_theta", found["rope_theta"], ConfigError, above=0, maximum=10**12)
        if (width := head_dim(sizes)) > 2:
            found["rope_theta"] *= settings["alpha"] ** (width / (width - 2))
        return found, {}  # its other keys have no effect
    if kind == "dynamic" and context not in (None, max_seq_len):
        raise ConfigError(f"{key}: {_CONTEXT} is {short_repr(context)}, but dynamic scaling starts from {max_seq_len}")
    names = {f.name for f in fields(_RULES[kind])} | _INFERRED.get(kind, set()) if kind != "default" else set()
    used = {name: settings.pop(name) for name in names & settings.keys() - {"original_max_seq_len", "q_growth"}}
    if family.growing_queries and _Q_GROWTH in settings:
        used["q_growth"] = settings.pop(_Q_GROWTH)
    if layers := [name for name, value in settings.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"{key}: {join_names(layers)} has its own settings; only one for all layers is implemented")
    if own is not None and kind != "dynamic" and "original_max_seq_len" not in names:
        settings[_CONTEXT] = own  # unused, of which transformers warns too
    if kind == "default":
        return found, settings
    if "original_max_seq_len" in names:
        used["original_max_seq_len"] = max_seq_len if context is None else context
    if kind in _INFERRED:
        _infer_attention_factor(key, kind, used, max_seq_len)
    try:
        return found | {"rope_scaling": RopeScaling.from_dict({"rope_type": kind} | used)}, settings
    except ConfigError as error:
        raise ConfigError(str(error).replace("rope_scaling", key, 1)) from None


def _rotary_dim(key: str, share: Any, sizes: Mapping[str, Any], family: Family) -> dict[str, int]:
    """The first elements of a head that are rotated; nothing where all are."""
    if share is None:
        share = family.partial or 1
    if family.partial is None and share != 1:
        raise ConfigError(f"{key}: partial_rotary_factor is {short_repr(share)}; only 1 is implemented")
    check_number("partial_rotary_factor", share, ConfigError, above=0, maximum=1)
    return {} if share == 1 else {"rotary_dim": int(head_dim(sizes) * share)}


def head_dim(sizes: Mapping[str, Any]) -> int:
    """The width of a head; 2 where the sizes are such that LlamaConfig refuses them."""
    dim, n_heads, width = (sizes.get(name) for name in ("dim", "n_heads", "head_dim"))
    if width is None and is_whole(dim) and is_whole(n_heads) and n_heads:
        width = dim // n_heads
    return width if width is not None and is_whole(width) and 0 < width < 2**31 else 2


def rope_to_hf(config: LlamaConfig, family: Family) -> dict[str, Any]:
    """The keys of transformers v4, which v5 reads too, and those of v5 where it has others."""
    scaling = _scaling_to_hf(config.rope_scaling, family)
    keys: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": scaling or None}
    if isinstance(config.rope_scaling, LongRopeScaling):  # Phi-3's own key, which wins
        keys[_CONTEXT] = config.rope_scaling.original_max_seq_len
    if family.partial is not None:
        keys["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    full = sliding = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    if family.two_ropes:
        if (theta := config.sliding_rope_theta) is not None:
            scaling = _scaling_to_hf(config.sliding_rope_scaling, family)
            sliding = {"rope_type": "default", "rope_theta": theta} | scaling
        keys["rope_local_base_freq"] = sliding["rope_theta"]
        keys["rope_parameters"] = {FULL: full, SLIDING: sliding}
    elif "rope_parameters" in family.defaults:  # transformers would take its default
        keys["rope_parameters"] = full
    return keys


def _scaling_to_hf(scaling: RopeScaling | None, family: Family) -> dict[str, Any]:
    keys = {"original_max_seq_len": _CONTEXT, "q_growth": _Q_GROWTH}
    data = {} if scaling is None else scaling.to_dict()
    if not family.growing_queries:
        data.pop("q_growth", None)
    return {keys.get(key, key): value for key, value in data.items()}


def _rope_type(key: str, settings: dict[str, Any], family: Family) -> str:
    """Takes the type out of the settings, under either name."""
    known = ", ".join(family.rope_types)
    given = [settings.pop(name) for name in ("rope_type", "type") if name in settings]
    if not given and "factor" in settings:
        raise ConfigError(f"{key} has a factor but no rope_type; known: {known}")
    kinds = [_OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in given] or ["default"]
    if kinds[0] not in family.rope_types or kinds[-1] != kinds[0]:
        raise ConfigError(f"{key}: unknown rope type {' and '.join(map(short_repr, given))}; known: {known}")
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
