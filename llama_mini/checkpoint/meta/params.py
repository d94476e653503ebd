"""Meta's params.json -> LlamaConfig."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.io.files import PARAMS, inside, read_json
from llama_mini.errors import ConfigError, errors_about, warn
from llama_mini.model.config import LlamaConfig
from llama_mini.model.rope_scaling import Llama3Scaling
from llama_mini.validate import check_flag, is_finite, is_whole, join_names, short_repr, warn_unknown

FIELDS = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "norm_eps", "max_seq_len", "rope_theta"}
FIELDS |= {"sliding_window"}  # of LlamaConfig, which has Meta's defaults
READ_KEYS = {*FIELDS, "hidden_dim", "multiple_of", "ffn_dim_multiplier", "vocab_size", "use_scaled_rope"}
READ_KEYS |= {"rope_scaling_factor", "quantization_args", "quantization"}
IGNORED_KEYS = {"max_batch_size", "model_parallel_size", "use_biases"}
REFUSED_KEYS = {"lora_args", "moe", "vision_encoder", "vision_chunk_size"}
REFUSED_KEYS |= {"yarn", "llama_4_scaling"}  # of Mistral's own params.json
LLAMA_3_2 = [[2048, 16], [3072, 28]]  # dim and layers of its text models; params.json does not state their factor


def read_params(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> LlamaConfig:
    """The configuration in a directory whose tensors have `shapes`. Raises CheckpointError, ConfigError."""
    path = inside(directory, PARAMS)
    raw = read_json(path)
    with errors_about(path):
        return from_params(raw, shapes)


def from_params(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> LlamaConfig:
    """A params.json as a LlamaConfig; the tensors' `shapes` supply what it does not state. Raises ConfigError."""
    settings = {key: value for key, value in raw.items() if value is not None}
    if refused := sorted(key for key in settings if key in REFUSED_KEYS or key.startswith("vision_")):
        raise ConfigError(f"{refused[0]} is {short_repr(settings[refused[0]])}; this is not implemented")
    for key in ("quantization_args", "quantization"):
        if settings.get(key):
            raise ConfigError(f"{key} is {short_repr(settings[key])}; give the checkpoint that is not quantised")
    check_flag("use_scaled_rope", settings.get("use_scaled_rope", False), ConfigError)
    if settings.get("use_biases") not in (None, False):
        raise ConfigError(f"use_biases is {short_repr(settings['use_biases'])}; only False is implemented")
    unknown = sorted(set(settings) - READ_KEYS - IGNORED_KEYS)
    if norms := [key for key in unknown if "norm" in key.lower()]:
        raise ConfigError(f"unknown {join_names(norms)}, which may change a norm; known: norm_eps")
    warn_unknown(PARAMS, unknown)
    if absent := [key for key in ("dim", "n_layers", "n_heads") if key not in settings]:
        raise ConfigError(f"{', '.join(absent)} missing")
    if "norm_eps" not in settings:
        warn(f"{PARAMS}: norm_eps is absent; 1e-05 is used, the default of Meta's own code")
    given = {key: settings[key] for key in FIELDS if key in settings}
    return LlamaConfig(
        **given if "max_seq_len" in given else given | {"max_seq_len": _context(settings)},
        hidden_dim=_hidden_dim(settings),
        vocab_size=_vocab_size(settings, shapes),
        rope_scaling=_scaling(settings),
        tie_word_embeddings="output.weight" not in shapes,
    )


def _hidden_dim(settings: Mapping[str, Any]) -> Any:
    """Two thirds of 4·dim, times a factor, rounded up to a multiple. Source: FeedForward in Meta's llama/model.py."""
    if "hidden_dim" in settings:
        return settings["hidden_dim"]
    dim, multiple, factor = settings["dim"], settings.get("multiple_of", 256), settings.get("ffn_dim_multiplier", 1)
    are_sizes = all(is_whole(size) and 0 < size < 2**31 for size in (dim, multiple))
    if not are_sizes or not is_finite(factor) or abs(factor) > 2**31:
        given = f"dim {short_repr(dim)}, multiple_of {short_repr(multiple)} and ffn_dim_multiplier {short_repr(factor)}"
        raise ConfigError(f"hidden_dim cannot be computed from {given}")
    hidden = int(factor * int(2 * (4 * dim) / 3))
    return multiple * -(-hidden // multiple)


def _vocab_size(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Meta writes -1 and leaves the size to the tokenizer. The head has a row for each token."""
    if settings.get("vocab_size", -1) != -1:
        return settings["vocab_size"]
    for name in ("output.weight", "tok_embeddings.weight"):
        if shapes.get(name):
            return shapes[name][0]
    raise ConfigError("vocab_size is -1, and there is no output.weight with a row for each token")


def _context(settings: Mapping[str, Any]) -> int:
    """params.json does not state the context length. The other settings tell which release the model is."""
    theta, eps = settings.get("rope_theta", 10_000.0), settings.get("norm_eps", 1e-5)
    if "head_dim" in settings and "hidden_dim" in settings:
        length, release = 32_768, "Mistral 7B"
    elif settings.get("use_scaled_rope"):
        length, release = 131_072, "LLaMA 3.1 and later"
    elif theta == 500_000:
        length, release = 8192, "LLaMA 3"
    elif theta == 1_000_000:
        length, release = 16_384, "Code Llama"
    else:
        length, release = (2048, "LLaMA 1") if eps == 1e-6 else (4096, "LLaMA 2")
    warn(f"{PARAMS} states no max_seq_len; {length} is assumed, as in {release}, which its other settings resemble")
    return length


def _scaling(settings: Mapping[str, Any]) -> Llama3Scaling | None:
    if not settings.get("use_scaled_rope"):
        return None
    factor = settings.get("rope_scaling_factor")
    if factor is None:
        factor = 32.0 if [settings["dim"], settings["n_layers"]] in LLAMA_3_2 else 8.0
        warn(f"{PARAMS} states no rope_scaling_factor; {factor:g} is assumed, as in the published model of these sizes")
    return Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
