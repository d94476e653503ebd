"""Weights in several safetensors files: checks that all are present and merges their headers."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from llama_mini.checkpoint.hf.safetensors_header import SafetensorsTensor, read_header
from llama_mini.checkpoint.io.files import inside
from llama_mini.checkpoint.source import StoredTensor
from llama_mini.errors import CheckpointFormatError, CheckpointIncompleteError
from llama_mini.validate import join_names

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,5})-of-(?P<count>\d{1,5})\.safetensors")


def complete_shards(directory: Path, names: list[str]) -> list[Path]:
    """The files of a checkpoint without an index: `names`, or the whole series if they are numbered shards.

    Raises CheckpointIncompleteError if one is missing, CheckpointFormatError if there are two series.
    """
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if not shards:
        return all_present(directory, names)
    first = shards[0]
    if other := [m[0] for m in shards if (m["stem"], m["count"]) != (first["stem"], first["count"])]:
        raise CheckpointFormatError(
            f"{directory} holds shards of two checkpoints, {first[0]} and {other[0]}, and no index to tell them apart"
        )
    width = len(first["number"])
    numbers = range(1, int(first["count"]) + 1)
    return all_present(directory, [f"{first['stem']}-{n:0{width}}-of-{first['count']}.safetensors" for n in numbers])


def all_present(directory: Path, names: list[str]) -> list[Path]:
    """The paths of these files. Raises CheckpointIncompleteError that lists missing ones, CheckpointPathError."""
    files = [inside(directory, name) for name in names]
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointIncompleteError(
            f"{directory}: missing {len(missing)} of {len(files)} shards: {join_names(missing)}"
        )
    return files


def read_headers(files: Iterable[Path]) -> dict[str, SafetensorsTensor]:
    """The tensors of all files. Raises CheckpointFormatError if two files hold a tensor of the same name."""
    tensors: dict[str, SafetensorsTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointFormatError(f"{name} is in both {tensors[name].file.name} and {file.name}")
            tensors[name] = tensor
    return tensors


def stored(tensors: Mapping[str, SafetensorsTensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(t.file, t.shape, t.dtype, t.end - t.begin) for name, t in tensors.items()}
