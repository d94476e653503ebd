"""Weights in several safetensors files: checks that all are present and merges their headers."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from llama_mini.checkpoint.io.files import inside
from llama_mini.checkpoint.io.safetensors_header import SafetensorsTensor, read_header
from llama_mini.checkpoint.keys import IGNORED_TENSORS, KeyTable, whole_name
from llama_mini.checkpoint.not_models import check_names
from llama_mini.errors import CheckpointFormatError, CheckpointIncompleteError, warn
from llama_mini.validate import join_names

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,5})-of-(?P<count>\d{1,5})(?P<suffix>\.\w+)")


def complete_shards(directory: Path, names: list[str]) -> list[Path]:
    """The files of a checkpoint without an index: `names`, or the whole series if they are numbered shards.

    Raises CheckpointIncompleteError if one is missing, CheckpointFormatError if there are two series.
    """
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if not shards:
        return all_present(directory, names)
    first = shards[0]
    if other := [m[0] for m in shards if (m["stem"], m["count"]) != (first["stem"], first["count"])]:
        both = f"{first[0]} and {other[0]}, and no index to tell them apart"
        raise CheckpointFormatError(f"{directory} holds shards of two checkpoints, {both}")
    width = len(first["number"])
    numbers = range(1, int(first["count"]) + 1)
    end = f"-of-{first['count']}{first['suffix']}"
    return all_present(directory, [f"{first['stem']}-{n:0{width}}{end}" for n in numbers])


def all_present(directory: Path, names: list[str]) -> list[Path]:
    """The paths of these files. Raises CheckpointIncompleteError that lists missing ones, CheckpointPathError."""
    files = [inside(directory, name) for name in names]
    if missing := [file.name for file in files if not file.exists()]:
        lower = {name.lower() for name in missing}
        alike = sorted(path.name for path in directory.iterdir() if path.name.lower() in lower)
        do = f"rename {join_names(alike)}, which differs in case" if alike else "download them"
        raise CheckpointIncompleteError(
            f"{directory}: missing {len(missing)} of {len(files)} shards: {join_names(missing)}; {do}"
        )
    return files


def read_headers(files: Sequence[Path], weight_map: Mapping[str, str] | None = None) -> dict[str, SafetensorsTensor]:
    """The tensors of files of one directory. Of several with one name, that in the file which the index names.

    Raises CheckpointFormatError if the index names none of them, or the tensors are no plain language model's.
    """
    found: dict[str, list[SafetensorsTensor]] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            found.setdefault(name, []).append(tensor)
    tensors: dict[str, SafetensorsTensor] = {}
    for name, alike in found.items():
        named = [tensor for tensor in alike if tensor.file.name == (weight_map or {}).get(name)]
        tensors[name], *others = named or alike
        if others:
            both = f"{name} is in both {tensors[name].file} and {others[0].file.name}"
            raise CheckpointFormatError(f"{both}; give the path of the file to read, or remove one")
    check_names(files[0].parent, tensors)
    return tensors


def indexed(
    index: Path,
    weight_map: Mapping[str, str],
    tensors: dict[str, SafetensorsTensor],
    keys: KeyTable,
    tied: Collection[str],
) -> dict[str, SafetensorsTensor]:
    """The tensors that the index names, and those that it forgot but that may be weights of the family.

    tied: the names of embedding and head if they are one, so that either may be absent.

    Raises CheckpointIncompleteError if no shard holds what the index names, unless the model does not need it.
    """
    spared = tied if any(name in tensors for name in tied) else ()
    absent = {name for name in weight_map if name not in tensors and not IGNORED_TENSORS.search(name)}
    if absent := absent.difference(spared):
        raise CheckpointIncompleteError(f"{index} names tensors that no shard holds: {join_names(sorted(absent))}")
    known = {whole_name(name).replace("{}", "0") for name in keys}
    kept = {n: t for n, t in tensors.items() if n in weight_map or re.sub(r"\.\d+\.", ".0.", n, count=1) in known}
    if extra := sorted(name for name in tensors.keys() - kept.keys() if not IGNORED_TENSORS.search(name)):
        warn(f"{index} does not name {join_names(extra)}: not read")
    return kept
