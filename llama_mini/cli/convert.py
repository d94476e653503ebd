"""The command `convert`: a checkpoint of any format becomes a Hugging Face directory, which transformers opens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_mini.checkpoint.hf.config import to_hf
from llama_mini.checkpoint.io.atomic import new_directory
from llama_mini.checkpoint.io.files import (
    SINGLE,
    TEMPLATES,
    TOKENIZER_FILES,
    VOCABULARIES,
    exists,
    inside,
    read_bytes,
    write_json,
)
from llama_mini.checkpoint.load import write_parameters
from llama_mini.checkpoint.match import empty_model, match, read_all
from llama_mini.checkpoint.open import Adapters, open_checkpoint
from llama_mini.checkpoint.source import Source
from llama_mini.checkpoint.special_ids import special_ids, with_missing_ids
from llama_mini.errors import TokenizerError, warn
from llama_mini.machine import as_dtype, dtype_name
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.tokenizer.config_files import template_files
from llama_mini.tokenizer.gguf_vocabulary import GGUFVocabulary
from llama_mini.tokenizer.meta_vocabulary import meta_tokenizer_files

COPIED = (*TOKENIZER_FILES, "vocab.json", "merges.txt")
CHAT_TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"


def convert(path: Path, target: Path, dtype: torch.dtype | str | None = None, adapter: Adapters | None = None) -> None:
    """Writes the directory `target`, complete or not at all, with one tensor in memory at a time.

    `dtype=None` keeps the dtype of the weights; quantised ones become bfloat16. Pickles are read too, if they hold
    nothing but plain tensors. Adapters are merged.

    Raises CheckpointError, ConfigError, TokenizerError.
    """
    source = open_checkpoint(path, Llama, adapter)
    model = empty_model(Llama, source)
    names = match(model, source)
    tokenizer = tokenizer_files(source)
    config = _with_special_ids(source.config, tokenizer)
    out_dtype = source.dtype if dtype is None else as_dtype(dtype)
    hf_config = to_hf(config, dtype_name(out_dtype), source.model_type)
    empty = ((name, model.get_parameter(name).to(out_dtype)) for name in names.values())
    with new_directory(target) as folder:
        write_json(folder / "config.json", hf_config)
        write_files(folder, {GENERATION: special_ids(config)} | tokenizer)
        rows = read_all(source, names, out_dtype, "converting", delay=0, whole=True)
        parameters = ((name, tensor) for name, _, tensor in rows)
        write_parameters(folder / SINGLE, hf_config["model_type"], config, empty, parameters)


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Writes what `tokenizer_files` returns."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            write_json(path, content)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else read_bytes(content))


def tokenizer_files(source: Source) -> dict[str, Any]:
    """File names with their contents: a JSON object, a text, or a file to copy. Raises TokenizerError."""
    files = _directory_files(source.directory) if source.gguf is None else _gguf_files(source)
    if source.tokenizer is not None:
        files = {name: files[name] for name in files.keys() & {GENERATION}} | _directory_files(source.tokenizer)
    if not set(VOCABULARIES) & set(files):
        warn(f"{source.directory} has no tokenizer; none is written")
    return files


def _directory_files(directory: Path) -> dict[str, Any]:
    copied = {name: path for name in COPIED if exists(path := inside(directory, name))}
    templates = {str(path.relative_to(directory)): path for path in template_files(directory).values()}
    files: dict[str, Any] = copied | templates
    if set(copied) - {CHAT_TEMPLATE, GENERATION} == {"tokenizer.model"}:  # Meta's: transformers needs more
        files = meta_tokenizer_files(copied["tokenizer.model"]) | files
    return files


def _gguf_files(source: Source) -> dict[str, Any]:
    assert source.gguf is not None
    vocabulary = GGUFVocabulary(source.gguf)
    files: dict[str, Any] = {
        "tokenizer.json": vocabulary.tokenizer_json(),
        "tokenizer_config.json": vocabulary.tokenizer_config(),
        GENERATION: special_ids(replace(source.config, eos_ids=tuple(vocabulary.eos_ids))),
    }
    for name, template in vocabulary.chat_templates.items():
        files[CHAT_TEMPLATE if name == "default" else str(inside(Path(TEMPLATES), f"{name}.jinja"))] = template
    return files


def _with_special_ids(config: LlamaConfig, files: dict[str, Any]) -> LlamaConfig:
    """The configuration, with missing special tokens from a tokenizer that we made. Raises TokenizerError."""
    generation, vocabulary = files.get(GENERATION), files.get("tokenizer.json")
    if isinstance(vocabulary, dict):
        added = [token["id"] for token in vocabulary["added_tokens"]]
        n_tokens = 1 + max([*vocabulary["model"]["vocab"].values(), *added])
        if n_tokens > config.vocab_size:
            raise TokenizerError(f"the tokenizer has {n_tokens} tokens, but the embedding has {config.vocab_size} rows")
    return with_missing_ids(config, generation) if isinstance(generation, dict) else config
