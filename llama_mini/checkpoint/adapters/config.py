"""adapter_config.json of PEFT or mlx-lm. Each key is read, refused by name, ignored, or unknown, which is a warning.

Sources: LoraConfig of PEFT 0.21, CONFIG_DEFAULTS of mlx-lm 0.32.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.io.files import ADAPTER_CONFIG, inside, read_json
from llama_mini.errors import ConfigError, errors_about
from llama_mini.validate import (
    check_choice,
    check_flag,
    check_number,
    check_whole,
    compile_pattern,
    is_token,
    short_repr,
    warn_unknown,
)

_MAX_RANK = 1 << 16
LARGEST = 1e9  # of alpha, and of the weight of an adapter: float32 must hold their product
_LORA = "only LoRA is read; merge it into its model with PEFT's merge_and_unload, and give the result"
_REFUSED: dict[str, tuple[Any, ...]] = {  # keys of PEFT that change what an adapter computes, but for these values
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others also change the base's weights
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication", "target_parameters", "arrow_config"), (None, [])),
    **dict.fromkeys(("kasa_config", "use_bdlora", "monteclora_config", "megatron_config"), (None, {})),
}
_READ = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
_READ |= {"use_rslora", "use_dora", "trainable_token_indices"}
# What follows from the tensors in the file, and what matters in training only. Linear layers ignore fan_in_fan_out.
_IGNORED = {"target_modules", "modules_to_save", "bias", "layers_to_transform", "layers_pattern", "exclude_modules"}
_IGNORED |= {"fan_in_fan_out", "task_type", "inference_mode", "lora_dropout", "auto_mapping", "peft_version"}
_IGNORED |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_core"}
_IGNORED |= {"qalora_group_size", "runtime_config", "ensure_weight_tying"}
_MLX_READ = {"fine_tune_type", "model", "lora_parameters"}
_MLX_IGNORED = {"train", "optimizer", "optimizer_config", "data", "seed", "num_layers", "lora_layers", "batch_size"}
_MLX_IGNORED |= {"iters", "val_batches", "learning_rate", "steps_per_report", "steps_per_eval", "resume_adapter_file"}
_MLX_IGNORED |= {"adapter_path", "save_every", "test", "test_batches", "max_seq_length", "config", "grad_checkpoint"}
_MLX_IGNORED |= {"grad_accumulation_steps", "clear_cache_threshold", "lr_schedule", "mask_prompt", "report_to"}
_MLX_IGNORED |= {"project_name", "trust_remote_code", "use_dora", "wandb"}
Patterns = tuple[tuple[re.Pattern[str], Any], ...]  # in the order of the file


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says.

    kind: a description for people: "LoRA", "DoRA", "weights" (whole ones, of mlx-lm's full fine-tuning).
    base, revision: the model that the adapter was trained on, as a path or a hub name; None if it names none.
    is_mlx: whether mlx-lm wrote it.
    rank, ranks: of the matrices, and of modules whose name a pattern matches.
    alpha, alphas: likewise. PEFT's scale is alpha / rank, or alpha / √rank if `by_root`; mlx-lm's is alpha itself.
    token_ids: module -> the rows of the tokens that were trained.
    """

    kind: str
    base: str | None
    revision: str | None = None
    is_mlx: bool
    rank: int
    alpha: float
    ranks: Patterns = ()
    alphas: Patterns = ()
    by_root: bool = False
    token_ids: Mapping[str, list[int]]

    def rank_of(self, module: str) -> int:
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B·A; `module` as the model of transformers names it, model.layers.0.self_attn.q_proj."""
        alpha, rank = _matching(self.alphas, module, self.alpha), self.rank_of(module)
        return float(alpha if self.is_mlx else alpha / (math.sqrt(rank) if self.by_root else rank))


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Raises CheckpointError, and ConfigError that names the file, the key and its value."""
    path = inside(directory, ADAPTER_CONFIG)
    raw = {key: value for key, value in read_json(path).items() if value is not None}
    with errors_about(path):
        return _mlx(raw) if "peft_type" not in raw and _MLX_READ & raw.keys() else _peft(raw)


def _peft(raw: Mapping[str, Any]) -> AdapterConfig:
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"peft_type is {short_repr(raw.get('peft_type'))}; {_LORA}")
    for key, allowed in _REFUSED.items():
        if raw.get(key) not in allowed:
            raise ConfigError(f"{key} is {short_repr(raw[key])}, which is not implemented; {_LORA}")
    warn_unknown(ADAPTER_CONFIG, raw.keys() - _READ - _IGNORED - _REFUSED.keys())
    for key in ("use_rslora", "use_dora"):
        check_flag(key, raw.get(key, False), ConfigError)
    tokens = raw.get("trainable_token_indices", {})
    tokens = {"embed_tokens": tokens} if isinstance(tokens, list) else tokens
    ids = list(tokens.values()) if isinstance(tokens, Mapping) else [None]
    if not all(isinstance(each, list) and all(map(is_token, each)) for each in ids):
        raise ConfigError(f"trainable_token_indices must be lists of token ids, not {short_repr(tokens)}")
    return AdapterConfig(
        kind="DoRA" if raw.get("use_dora") else "LoRA",
        base=_text(raw, "base_model_name_or_path"),
        revision=None if raw.get("revision") == "unsloth" else _text(raw, "revision"),  # Unsloth writes it
        is_mlx=False,
        rank=_rank("r", raw.get("r", 8)),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha", 8)),
        ranks=_patterns(raw, "rank_pattern", _rank),
        alphas=_patterns(raw, "alpha_pattern", _alpha),
        by_root=raw.get("use_rslora", False),
        token_ids=tokens,
    )


def _mlx(raw: Mapping[str, Any]) -> AdapterConfig:
    kind = raw.get("fine_tune_type", "lora")
    check_choice("fine_tune_type", kind, ("lora", "dora", "full"), ConfigError)
    warn_unknown(ADAPTER_CONFIG, raw.keys() - _MLX_READ - _MLX_IGNORED)
    settings = raw.get("lora_parameters", {})
    if not isinstance(settings, Mapping):
        raise ConfigError(f"lora_parameters must be an object, not {short_repr(settings)}")
    rank = 1 if kind == "full" else _rank("lora_parameters.rank", settings.get("rank"))
    scale = 1.0 if kind == "full" else _alpha("lora_parameters.scale", settings.get("scale"))
    # Before 0.15, mlx-lm multiplied by alpha / rank. Files that say num_layers are later, and alpha is without effect.
    known = {"rank", "scale", "dropout", "keys", *(["alpha"] if "num_layers" in raw else [])}
    warn_unknown(f"{ADAPTER_CONFIG}: lora_parameters", settings.keys() - known)
    return AdapterConfig(
        kind={"lora": "LoRA", "dora": "DoRA", "full": "weights"}[kind],
        base=_text(raw, "model"),
        is_mlx=True,
        rank=rank,
        alpha=scale,
        token_ids={},
    )


def _rank(key: str, value: Any) -> int:
    check_whole(key, value, ConfigError, 1, _MAX_RANK)
    return value


def _alpha(key: str, value: Any) -> float:
    check_number(key, value, ConfigError, -LARGEST, LARGEST)
    return value


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    if not isinstance(value := raw.get(key), str | None):
        raise ConfigError(f"{key} must be a path or a hub name, not {short_repr(value)}")
    return value or None


def _patterns(raw: Mapping[str, Any], key: str, checked: Callable[[str, Any], Any]) -> Patterns:
    """Regular expressions for the end of a module's name, with their values."""
    values = raw.get(key, {})
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key} must be an object, not {short_repr(values)}")
    patterns = []
    for pattern, value in values.items():
        compile_pattern(key, pattern, ConfigError, repetitions=3)
        patterns.append((re.compile(rf"(?:.*\.)?(?:{pattern})"), checked(f"a number of {key}", value)))
    return tuple(patterns)


def _matching(patterns: Patterns, module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)
