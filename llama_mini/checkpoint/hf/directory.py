"""A Hugging Face directory: config.json, and safetensors in one file, in shards with an index, or in shards without."""

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_mini.checkpoint.families import key_table
from llama_mini.checkpoint.hf.config import read_config
from llama_mini.checkpoint.hf.safetensors_data import read_rows
from llama_mini.checkpoint.hf.safetensors_header import weight_dtype
from llama_mini.checkpoint.hf.shards import all_present, complete_shards, read_headers, stored
from llama_mini.checkpoint.io.files import INDEX, SINGLE, inside, read_weight_map
from llama_mini.checkpoint.keys import IGNORED_TENSORS, KeyTable
from llama_mini.checkpoint.source import Destination, Rows, Source, rows_per_chunk
from llama_mini.errors import CheckpointFormatError, CheckpointIncompleteError, LlamaMiniWarning
from llama_mini.machine import DTYPES
from llama_mini.validate import join_names

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
CONVERT = "llama-mini convert {source} NEW_DIRECTORY"


def open_hf_directory(directory: Path, file: Path | None = None) -> Source:
    """Opens a directory; with `file`, only that weights file. Raises CheckpointError, ConfigError."""
    config, raw = read_config(directory)
    files, indexed = ([file], set[str]()) if file is not None else _files(directory)
    tensors = read_headers(files)
    if absent := sorted(indexed - set(tensors)):
        raise CheckpointIncompleteError(f"{directory / INDEX} names tensors that no shard holds: {join_names(absent)}")
    dtypes = [weight_dtype(tensor) for name, tensor in tensors.items() if not IGNORED_TENSORS.search(name)]

    def read(names: Collection[str], _: torch.dtype, destination: Destination, whole: bool) -> Iterator[Rows[Tensor]]:
        selected = (tensors[name] for name in names)
        for tensor, first, rows in read_rows(selected, None if whole else rows_per_chunk, destination):
            yield tensor.name, first, rows
            del rows  # before the next ones are read

    return Source(
        path=directory if file is None else file,
        format=f"Hugging Face directory, {len(files)} safetensors file{'s' if len(files) > 1 else ''}",
        model_type=raw["model_type"],
        config=config,
        dtype=common_dtype(dtypes, raw.get("dtype") or raw.get("torch_dtype")),
        keys=keys_of(raw["model_type"], tensors),
        tensors=stored(tensors),
        read_rows=read,
    )


def common_dtype(dtypes: Collection[torch.dtype], stated: object) -> torch.dtype:
    """The model's dtype: that of its tensors. If they differ, the config's, or else one that holds all of them."""
    distinct = set(dtypes)
    if len(distinct) > 1 and isinstance(stated, str) and stated in DTYPES:
        return DTYPES[stated]
    return functools.reduce(torch.promote_types, distinct) if distinct else torch.float32


def keys_of(model_type: str, names: Mapping[str, object]) -> KeyTable:
    """The family's table. A model saved without its head (transformers' LlamaModel) has names without `model.`."""
    table = key_table(model_type)
    if "embed_tokens.weight" in names:
        return {theirs.removeprefix("model."): ours for theirs, ours in table.items()}
    return table


def _files(directory: Path) -> tuple[list[Path], set[str]]:
    """The files to read, and the tensor names that the index lists."""
    single, index = inside(directory, SINGLE), inside(directory, INDEX)
    if single.exists():  # wins over an index, as in transformers
        if index.exists():
            message = f"{directory} has both {SINGLE} and {INDEX}: only the former is read, not the shards"
            warnings.warn(message, LlamaMiniWarning, stacklevel=4)
        return [single], set()
    if index.exists():
        weight_map = read_weight_map(index)
        return all_present(directory, sorted(set(weight_map.values()))), set(weight_map)
    names = sorted(p.name for p in directory.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if weights := [name for name in names if not name.startswith("adapter_")]:
        return complete_shards(directory, weights), set()
    if names:
        raise CheckpointFormatError(f"{directory} holds only an adapter, {names[0]}; merge it into its model first")
    if pickles := [name for name in PICKLES if (directory / name).is_file()]:
        raise CheckpointFormatError(
            f"{directory} holds its weights as a pickle, {pickles[0]}, which can run code when it is opened; "
            f"convert it once: {CONVERT.format(source=directory)}"
        )
    raise CheckpointIncompleteError(f"{directory} holds neither {SINGLE} nor {INDEX}, and no other *.safetensors")
