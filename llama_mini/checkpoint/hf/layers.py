"""Which layers have a sliding window and which rotate, in config.json and in LlamaConfig."""

from collections.abc import Mapping
from typing import Any

from llama_mini.checkpoint.families.family import Family
from llama_mini.errors import ConfigError
from llama_mini.model.config import LlamaConfig
from llama_mini.validate import check_whole, is_whole, short_repr

FULL, SLIDING = "full_attention", "sliding_attention"
_KEYS = {"none": set[str](), "every": {"sliding_window"}, "listed": {"sliding_window", "sliding_window_pattern"}}
_OF_HYBRIDS = {f"mamba_{key}" for key in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand")}
_OF_HYBRIDS |= {"mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit"}
_OF_HYBRIDS |= {"intermediate_size", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"}
_KEYS["switched"] = {"sliding_window", "use_sliding_window", "max_window_layers"}


def layer_keys(family: Family) -> set[str]:
    """The keys of config.json that this file reads for a family."""
    rotary = {
        "listed": {"no_rope_layers", "no_rope_layer_interval"},
        "stated": {"position_embedding_type", *_OF_HYBRIDS},
    }
    return _KEYS[family.window] | rotary.get(family.unrotated, set())


def read_layers(raw: Mapping[str, Any], settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of LlamaConfig. `settings` are those of `raw` with the family's defaults. Raises ConfigError."""
    n_layers, types = settings["num_hidden_layers"], raw.get("layer_types")
    if not is_whole(n_layers) or n_layers > 10_000:  # LlamaConfig refuses it
        return {}
    window = settings.get("sliding_window") if family.window != "none" else None
    if family.window == "switched" and not settings.get("use_sliding_window", False):
        window = None
    unrotated = _listed_unrotated(settings, n_layers) if family.unrotated == "listed" else ()
    layers = () if window is None else _default_sliding(settings, family, n_layers, unrotated, types is not None)
    if family.unrotated == "stated":
        types = [FULL if kind == "attention" else kind for kind in types] if isinstance(types, list) else types
        if types is None or (isinstance(types, list) and ("mamba" in types or "linear_attention" in types)):
            raise ConfigError(f"layer_types is {short_repr(types)}: state spaces are not read")  # null: all are such
    if types is not None:
        if not isinstance(types, list) or len(types) != n_layers or not all(t in (FULL, SLIDING) for t in types):
            known = f"{FULL} or {SLIDING} for each of {n_layers} layers"
            raise ConfigError(f"layer_types must list {known}, not {short_repr(types)}")
        sliding = tuple(i for i, kind in enumerate(types) if kind == SLIDING)
        if sliding != layers and (family.window in ("none", "every") or window is None):
            raise ConfigError(f"layer_types has {len(sliding)} {SLIDING}, but other keys give {len(layers)} a window")
        layers = sliding
    if family.unrotated == "stated":
        unrotated = () if settings.get("position_embedding_type") == "rope" else tuple(range(n_layers))
    if family.unrotated == "full" or (family.unrotated == "full_beside_sliding" and window is not None):
        unrotated = tuple(i for i in range(n_layers) if i not in layers)
    sliding_window = window if layers else None
    return {"sliding_window": sliding_window, "sliding_layers": layers, "unrotated_layers": unrotated}


def layers_to_hf(config: LlamaConfig, family: Family) -> dict[str, Any]:
    """The inverse of `read_layers`, as far as the family can express it."""
    keys: dict[str, Any] = {}
    if family.window != "none":
        keys["sliding_window"] = config.sliding_window
    if family.window in ("listed", "switched"):
        keys["layer_types"] = [SLIDING if i in config.sliding_layers else FULL for i in range(config.n_layers)]
    if family.window == "switched":
        keys["use_sliding_window"] = config.sliding_window is not None
    elif family.pattern and config.sliding_window is None and (not family.unrotated or config.unrotated_layers):
        keys["sliding_window"] = family.defaults["sliding_window"]  # no layer uses it, but transformers needs one
    if family.unrotated == "listed":
        keys["no_rope_layers"] = [int(i not in config.unrotated_layers) for i in range(config.n_layers)]
    if family.unrotated == "stated":
        keys["layer_types"] = ["attention"] * config.n_layers
        keys["position_embedding_type"] = None if config.unrotated_layers else "rope"
        keys["mamba_n_heads"] = 1  # transformers' default may not divide the width
    return keys


def _default_sliding(
    settings: Mapping[str, Any], family: Family, n_layers: int, unrotated: tuple[int, ...], are_listed: bool
) -> tuple[int, ...]:
    """The layers with a window, without `layer_types`."""
    if family.window == "switched":
        last = settings.get("max_window_layers", 0)
        if not is_whole(last):
            raise ConfigError(f"max_window_layers must be a whole number, not {short_repr(last)}")
        return unrotated if family.unrotated == "listed" else tuple(range(max(last, 0), n_layers))
    if family.pattern is None or are_listed:
        return tuple(range(n_layers))
    period, full = family.pattern
    if (stated := settings.get("sliding_window_pattern")) is not None:
        check_whole("sliding_window_pattern", stated, ConfigError, 1)
        period, full = int(stated), int(stated) - 1
    return tuple(i for i in range(n_layers) if i % period != full)


def _listed_unrotated(settings: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    rotated, interval = settings.get("no_rope_layers"), settings["no_rope_layer_interval"]
    if rotated is None:
        check_whole("no_rope_layer_interval", interval, ConfigError, 1)
        return tuple(range(interval - 1, n_layers, interval))
    if not isinstance(rotated, list) or len(rotated) < n_layers or not all(flag in (0, 1) for flag in rotated):
        raise ConfigError(f"no_rope_layers must list 0 or 1 for each of {n_layers} layers, not {short_repr(rotated)}")
    return tuple(i for i, flag in enumerate(rotated[:n_layers]) if not flag)
