"""The ids of BOS, EOS and PAD, and where each format states them.

- config.json and generation_config.json: `bos_token_id`, `eos_token_id`, `pad_token_id`, each an id or a list of ids.
  LlamaConfig takes those of config.json. A text ends at the EOS of generation_config.json, if that file states one.
- GGUF: `tokenizer.ggml.bos_token_id` and so on, one id each. Most files state one EOS but have more: see END_TOKENS.
- tokenizer_config.json names tokens, not ids; `Tokenizer` adds its eos_token to the EOS ids.
- Meta's tokenizer.model has them in its vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_mini.errors import ConfigError, LlamaMiniError, warn
from llama_mini.validate import is_whole, short_repr

if TYPE_CHECKING:  # it imports torch, which a tokenizer does not need
    from llama_mini.model.config import LlamaConfig

END_TOKENS = {  # of GGUF files: llama.cpp ends a text at them, as far as they belong to models that are read here
    *("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),  # LLaMA 3's
    *("<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<|return|>", "<|call|>"),
    *("</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>"),
    # Of code models: padding, and where another repository or file begins.
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}


def read_special_ids(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a LlamaConfig, from config.json or generation_config.json; some files write -1 for no id.

    Raises ConfigError.
    """
    found = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(is_whole, ids)):
            raise ConfigError(f"{key} must be a token id or a list of them, not {short_repr(value)}")
        found[key] = tuple(id for id in ids if id >= 0)
    bos, eos, pad = found.values()
    return {"bos_id": bos[0] if bos else None, "eos_ids": eos, "pad_id": pad[0] if pad else None}


def special_ids(config: "LlamaConfig") -> dict[str, Any]:
    """The inverse of `read_special_ids`."""
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}


def with_missing_ids(config: "LlamaConfig", raw: Mapping[str, Any]) -> "LlamaConfig":
    """The configuration, with the ids that it lacks taken from another file's JSON."""
    ids = read_special_ids(raw)
    return replace(config, **{name: value for name, value in ids.items() if getattr(config, name) in (None, ())})


def gguf_special_ids(metadata: Mapping[str, Any], vocab_size: int, path: Path) -> dict[str, Any]:
    """The fields of a LlamaConfig, from a GGUF file's metadata. Raises ConfigError."""
    names = ("bos", "eos", "padding")
    bos, eos, pad = (gguf_token_id(metadata, name, vocab_size, path, ConfigError) for name in names)
    return {"bos_id": bos, "eos_ids": () if eos is None else (eos,), "pad_id": pad}


def gguf_token_id(
    metadata: Mapping[str, Any], name: str, vocab_size: int, path: Path, error: type[LlamaMiniError]
) -> int | None:
    """The id that a GGUF file states. One outside the vocabulary is ignored with a warning, as llama.cpp does."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None or (is_whole(value) and 0 <= value < vocab_size):
        return value
    problem = f"{key} must be a token from 0 to {vocab_size - 1}, not {short_repr(value)}"
    if not is_whole(value):
        raise error(problem)
    warn(f"{path}: {problem}; ignored")
    return None
