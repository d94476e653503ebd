"""A Hugging Face directory: config.json, and safetensors in one file, in shards with an index, or in shards without."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_mini.checkpoint.families import has_interleaved_pairs, key_table
from llama_mini.checkpoint.hf.config import PART_OF, read_config
from llama_mini.checkpoint.hf.safetensors_data import reader, stored
from llama_mini.checkpoint.hf.shards import all_present, complete_shards, indexed, read_headers
from llama_mini.checkpoint.io.file_kind import FileKind, file_kind
from llama_mini.checkpoint.io.files import ADAPTER_CONFIG, INDEX, PICKLES, SINGLE, inside, read_weight_map
from llama_mini.checkpoint.io.safetensors_header import cut_rows, weight_dtype
from llama_mini.checkpoint.keys import EMBEDDING, HEAD, IGNORED_TENSORS, names_in_file, text_tensors, to_file_name
from llama_mini.checkpoint.not_models import describe_directory, told_by_name
from llama_mini.checkpoint.quantized.methods import quantized_matrices
from llama_mini.checkpoint.quantized.weight import cut_matrix, read_matrix
from llama_mini.checkpoint.rows import split_parts, with_split_pairs
from llama_mini.checkpoint.source import Destination, Rows, Source, rows_per_chunk
from llama_mini.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError, warn
from llama_mini.machine import DTYPES

T = TypeVar("T")
_DECODED = 1 << 19  # elements of a quantised matrix that are decoded at once: there are several copies meanwhile


def open_hf_directory(directory: Path, file: Path | None = None) -> Source:
    """Opens a directory; with `file`, only that weights file. Raises CheckpointError, ConfigError."""
    config, raw = read_config(directory)
    files, weight_map = ([file], dict[str, str]()) if file is not None else _files(directory)
    tensors = read_headers(files, weight_map)
    parts = text_tensors(tensors, raw[PART_OF]) if PART_OF in raw else set(tensors)
    keys = names_in_file(key_table(raw["model_type"]), parts, is_part=PART_OF in raw)
    if weight_map:
        tied = {to_file_name(name, keys) for name in (HEAD, EMBEDDING)} if config.tie_word_embeddings else set[str]()
        tensors = indexed(directory / INDEX, weight_map, tensors, keys, tied)
    tensors = {name: tensor for name, tensor in tensors.items() if name in parts}
    if file is None and (directory / ADAPTER_CONFIG).is_file():
        warn(f"{directory} also holds an adapter ({ADAPTER_CONFIG}), merged only if it is given as an adapter")
    matrices = quantized_matrices(directory, raw, tensors)
    parts = {part.name for matrix in matrices.values() for part in matrix.parts.values()}
    plain = {name: tensor for name, tensor in tensors.items() if name not in parts}
    plain, matrices = split_parts(plain, keys, config, cut_rows), split_parts(matrices, keys, config, cut_matrix)
    read_plain = reader(plain)

    def read(names: Collection[str], dtype: torch.dtype, to: Destination, whole: bool) -> Iterator[Rows[Tensor]]:
        yield from read_plain([name for name in names if name in plain], dtype, to, whole)
        yield from read_matrices([name for name in names if name in matrices], attrgetter("floats"), whole)

    def read_matrices(names: Collection[str], decode_of: Callable[..., Any], whole: bool = False) -> Iterator[Rows]:
        for matrix in (matrices[name] for name in names):
            at_once = matrix.shape[0] if whole else rows_per_chunk(matrix.shape[1], _DECODED)
            for first, rows in read_matrix(matrix, decode_of(matrix), at_once):
                yield matrix.name, first, rows
                del rows  # before the next ones are read

    source = Source(
        path=directory if file is None else file,
        format=f"Hugging Face directory, {len(files)} safetensors file{'s' if len(files) > 1 else ''}",
        model_type=raw["model_type"],
        config=config,
        dtype=common_dtype(plain, weight_dtype, raw.get("dtype") or raw.get("torch_dtype")),
        keys=keys,
        tensors=stored(plain) | {name: matrix.stored() for name, matrix in matrices.items()},
        read_rows=read,
        read_quantized=lambda names: read_matrices(names, attrgetter("codes")),
    )
    return with_split_pairs(source) if has_interleaved_pairs(source.model_type) else source


def common_dtype(tensors: Mapping[str, T], dtype_of: Callable[[T], torch.dtype], stated: object = None) -> torch.dtype:
    """The model's dtype: that of its tensors. If they differ, that of config.json, or else one that holds all."""
    distinct = {dtype_of(tensor) for name, tensor in tensors.items() if not IGNORED_TENSORS.search(name)}
    if len(distinct) > 1 and isinstance(stated, str) and stated in DTYPES:
        return DTYPES[stated]
    return functools.reduce(torch.promote_types, distinct) if distinct else torch.float32


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and the index: tensor name -> file name, empty where there is none."""
    single, index = inside(directory, SINGLE), inside(directory, INDEX)
    if single.exists():  # wins over an index, as in transformers
        shards: set[str] = set()
        with contextlib.suppress(CheckpointError):  # it is not read in any case
            shards = set(read_weight_map(index).values())
        if shards - {SINGLE}:  # mlx-lm writes an index of the single file
            warn(f"{directory} has both {SINGLE} and {INDEX}: only the former is read, not the shards")
        return [single], {}
    if index.exists():
        weight_map = read_weight_map(index)
        return all_present(directory, sorted(set(weight_map.values()))), weight_map
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if weights := [name for name in names if not name.startswith(("adapter", "consolidated"))]:
        return complete_shards(directory, weights), {}
    raise no_weights(directory, f"neither {SINGLE} nor {INDEX}, and no other *.safetensors")


def no_weights(directory: Path, missing: str) -> CheckpointError:
    """The error for a directory without safetensors: what else it holds, or else what is missing."""
    if pickles := pickles_in(directory):
        why = f"{pickles[0]}, which can run code when it is opened"
        do = f"convert it once: llama-mini convert {directory} NEW_DIRECTORY"
        return CheckpointFormatError(f"{directory} holds its weights as a pickle, {why}; {do}")
    if (what := describe_directory(directory)) is not None:
        return CheckpointFormatError(f"{directory} {what}")
    return CheckpointIncompleteError(f"{directory} holds {missing}")


def pickles_in(directory: Path) -> list[str]:
    """The pickled weights: pytorch_model.bin, its shards or variants, else any, without the state of a training run."""
    for pattern in ("pytorch_model.bin", "pytorch_model*.bin", *(f"*{suffix}" for suffix in PICKLES)):
        files = [f for f in sorted(directory.glob(pattern)) if f.is_file() and not told_by_name([f.name])]
        by_name = pattern.startswith("pytorch_model")
        if names := [file.name for file in files if by_name or file_kind(file) is FileKind.PICKLE]:
            return names
    return []
