"""A Hugging Face directory: config.json, and safetensors in one file, in shards with an index, or in shards without."""

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_mini.checkpoint.families import key_table
from llama_mini.checkpoint.hf.config import read_config
from llama_mini.checkpoint.hf.safetensors_data import Room, read_rows, read_tensors
from llama_mini.checkpoint.hf.safetensors_header import TensorInfo, weight_dtype
from llama_mini.checkpoint.hf.shards import all_present, complete_shards, read_headers, stored
from llama_mini.checkpoint.io.files import INDEX, SINGLE, inside, read_weight_map
from llama_mini.checkpoint.keys import IGNORED, KeyTable
from llama_mini.checkpoint.source import Rows, Source, rows_at_once
from llama_mini.errors import CheckpointFormatError, CheckpointIncompleteError, LlamaMiniWarning
from llama_mini.machine import DTYPES
from llama_mini.validate import join_names

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
CONVERT = "python scripts/convert.py {source} NEW_DIRECTORY"


def open_hf_directory(directory: Path, file: Path | None = None) -> Source:
    """Opens `directory`, or of its weights just `file`. Raises CheckpointError, ConfigError."""
    config, raw = read_config(directory)
    files, promised = ([file], set[str]()) if file is not None else _files(directory)
    infos = _infos(directory, files, promised)
    dtypes = {name: weight_dtype(info) for name, info in infos.items() if not IGNORED.search(name)}

    def read(names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for info, tensor in read_tensors(infos[name] for name in names):
            wanted = tensor.to(dtype)
            del tensor  # the next one is made before the loop would let go of it
            yield info.name, wanted

    def by_rows(names: Collection[str], _: torch.dtype, room: Room) -> Iterator[Rows[Tensor]]:
        for info, first, rows in read_rows((infos[name] for name in names), rows_at_once, room):
            yield info.name, first, rows
            del rows  # before the next ones are made

    return Source(
        path=directory if file is None else file,
        format=f"Hugging Face directory, {len(files)} safetensors file{'s' if len(files) > 1 else ''}",
        model_type=raw["model_type"],
        config=config,
        dtype=common_dtype(dtypes.values(), raw.get("dtype") or raw.get("torch_dtype")),
        keys=keys_of(raw["model_type"], infos),
        tensors=stored(infos),
        read=read,
        read_rows=by_rows,
    )


def common_dtype(found: Collection[torch.dtype], stated: object) -> torch.dtype:
    """The one dtype a model gets: that of its tensors; where they differ, the config's, else the widest of them."""
    kinds = set(found)
    if len(kinds) > 1 and isinstance(stated, str) and stated in DTYPES:
        return DTYPES[stated]
    return functools.reduce(torch.promote_types, kinds) if kinds else torch.float32


def keys_of(model_type: str, names: Mapping[str, object]) -> KeyTable:
    """The family's table; a model saved without its head class has the same names without `model.`."""
    table = key_table(model_type)
    if "embed_tokens.weight" in names:
        return {theirs.removeprefix("model."): ours for theirs, ours in table.items()}
    return table


def _files(directory: Path) -> tuple[list[Path], set[str]]:
    """The files to read, and the tensor names that the index promises."""
    single, index = inside(directory, SINGLE), inside(directory, INDEX)
    if single.exists():  # before an index, as transformers has it
        if index.exists():
            message = f"{directory} has both {SINGLE} and {INDEX}: the former is read, the shards are not"
            warnings.warn(message, LlamaMiniWarning, stacklevel=4)
        return [single], set()
    if index.exists():
        weight_map = read_weight_map(index)
        return all_present(directory, sorted(set(weight_map.values()))), set(weight_map)
    found = sorted(p.name for p in directory.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if weights := [name for name in found if not name.startswith("adapter_")]:
        return complete_shards(directory, weights), set()
    if found:
        raise CheckpointFormatError(f"{directory} holds an adapter alone, {found[0]}; merge it into its model first")
    if pickles := [name for name in PICKLES if (directory / name).is_file()]:
        raise CheckpointFormatError(
            f"{directory} holds its weights as a pickle, {pickles[0]}, which can run code when it is opened; "
            f"convert it once: {CONVERT.format(source=directory)}"
        )
    raise CheckpointIncompleteError(f"{directory} holds neither {SINGLE} nor {INDEX}, and no other *.safetensors")


def _infos(directory: Path, files: list[Path], promised: set[str]) -> dict[str, TensorInfo]:
    infos = read_headers(files)
    if absent := sorted(promised - set(infos)):
        raise CheckpointIncompleteError(f"{directory / INDEX} names tensors that no shard holds: {join_names(absent)}")
    return infos
