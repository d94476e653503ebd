"""A checkpoint of any format, opened and not yet read; its tensors against those that its configuration asks for."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.gguf.tensors import Blocks
from llama_mini.checkpoint.hf.safetensors_data import Room, no_room
from llama_mini.checkpoint.keys import IGNORED, KeyTable, to_file_name
from llama_mini.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError, LlamaMiniWarning
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.validate import join_names

Model = TypeVar("Model", bound=Llama)
Numbers = TypeVar("Numbers", Tensor, Blocks)
Rows = tuple[str, int, Numbers]  # a tensor's name, the first of some of its rows, and these
HEAD, EMBEDDING = "lm_head.weight", "tok_embeddings.weight"
_AT_ONCE = 1 << 20  # numbers of a tensor that are read at once: beside its codes a whole embedding is too much
_BLOCK = 16  # rows that stay together


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape` as the model has it, `number_format` as the file names it (BF16, Q4_1)."""

    file: Path
    shape: tuple[int, ...]
    number_format: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """What every format comes down to.

    path: the directory or file.
    format: a phrase for people, such as "Hugging Face directory, 2 safetensors files".
    model_type: the family, in Hugging Face's words.
    dtype: what the model gets if nobody asks for another.
    keys: names in the file -> ours.
    tensors: by name in the file.
    read: gives the tensors of these names in a dtype, each once, as the model has them, in that order
        where the tensors of a file stand together in it.
    read_rows: the same by the rows, in order, where the format can: at most `rows_at_once` of a tensor, in whatever
        dtype is at hand, perhaps where `room` says.
    read_coded: the same for tensors of four and eight bits, as they are stored; there where such tensors are.
    gguf: the header, where the checkpoint is a GGUF file, which holds the tokenizer too.
    """

    path: Path
    format: str
    model_type: str
    config: LlamaConfig
    dtype: torch.dtype
    keys: KeyTable
    tensors: Mapping[str, StoredTensor]
    read: Callable[[Collection[str], torch.dtype], Iterator[tuple[str, Tensor]]]
    read_rows: Callable[[Collection[str], torch.dtype, Room], Iterator[Rows[Tensor]]] | None = None
    read_coded: Callable[[Collection[str]], Iterator[Rows[Blocks]]] = lambda _: iter(())
    gguf: GGUFHeader | None = None

    @property
    def directory(self) -> Path:
        """Where the files that belong to it lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def by_rows(self, names: Collection[str], dtype: torch.dtype, room: Room = no_room) -> Iterator[Rows[Tensor]]:
        """The tensors by their rows, which lie where `room` says when it says so."""
        if self.read_rows is not None:
            found = self.read_rows(names, dtype, room)
        else:
            found = ((name, 0, tensor) for name, tensor in self.read(names, dtype))
        for name, first, rows in found:
            place = room(name, first, tuple(rows.shape))
            if place is None:
                place = rows.to(dtype)
            elif place.data_ptr() != rows.data_ptr():
                place.copy_(rows)
            del rows  # before the next ones are made
            yield name, first, place
            del place


def rows_at_once(columns: int) -> int:
    return max(_BLOCK, _AT_ONCE // max(columns, 1) // _BLOCK * _BLOCK)


def empty_model(cls: type[Model], source: Source) -> Model:
    """The model on the meta device. Raises CheckpointMismatchError, ConfigError where there can be none."""
    config = source.config
    if config.n_layers > len(source.tensors):  # before a model of a billion layers is built
        raise CheckpointMismatchError(
            f"{source.path} asks for {config.n_layers} layers, but holds {len(source.tensors)} tensors in all"
        )
    try:
        with torch.device("meta"):
            return cls(config)
    except RuntimeError as error:  # a product of sizes that no address reaches
        raise ConfigError(f"{source.path}: no model of these sizes can be made: {error}") from None


def n_parameters(source: Source) -> int:
    """Numbers in the checkpoint's tensors: those of its model, without building one."""
    return sum(math.prod(tensor.shape) for name, tensor in source.tensors.items() if not IGNORED.search(name))


def match(model: nn.Module, source: Source) -> dict[str, str]:
    """Name in the file -> ours, for every parameter, as they lie in the files.

    Raises CheckpointMismatchError that names every missing, unexpected and misshaped tensor at once.
    """
    wanted = {to_file_name(name, source.keys): (name, tuple(p.shape)) for name, p in model.named_parameters()}
    head, embedding = to_file_name(HEAD, source.keys), to_file_name(EMBEDDING, source.keys)
    if head not in wanted and head in source.tensors and embedding not in source.tensors:
        wanted[head] = wanted.pop(embedding)  # tied, and stored once under the name of the head
    ignored = {name for name in source.tensors if IGNORED.search(name)} | set(_spare_head(source))
    found = {name: stored.shape for name, stored in source.tensors.items() if name not in ignored or name in wanted}
    faults = []
    if missing := sorted(set(wanted) - set(found)):
        faults.append(f"{len(missing)} missing: {join_names(missing)}")
    if unexpected := sorted(set(found) - set(wanted)):
        faults.append(f"{len(unexpected)} unexpected: {join_names(unexpected)}")
    if misshaped := sorted(name for name in set(wanted) & set(found) if wanted[name][1] != found[name]):
        shapes = [f"{name} is {found[name]}, not {wanted[name][1]}" for name in misshaped]
        faults.append(f"{len(misshaped)} misshaped: {join_names(shapes)}")
    if faults:
        raise CheckpointMismatchError(
            f"{source.path}: the tensors are not those of its configuration: {'; '.join(faults)}"
        )
    return {theirs: wanted[theirs][0] for theirs in source.tensors if theirs in wanted}


def read_all(
    source: Source,
    names: Mapping[str, str],
    dtype: torch.dtype,
    what: str,
    delay: float = 1,
    room: Room = no_room,
) -> Iterator[Rows[Tensor]]:
    """Every tensor that `match` found, by our name, with a progress bar after `delay` seconds, on a terminal alone.

    Raises CheckpointFormatError where a norm or a bias is not finite: no answer would be.
    """
    with tqdm(total=len(names), desc=what, unit="tensor", delay=delay, leave=False, disable=None) as bar:
        for theirs, first, tensor in source.by_rows(names.keys(), dtype, room):
            if tensor.ndim == 1 and not torch.isfinite(tensor).all():
                raise CheckpointFormatError(
                    f"{source.tensors[theirs].file}: {theirs} holds NaN or infinity; download it again"
                )
            yield names[theirs], first, tensor
            bar.update(first == 0)


def warn_of_other_head(source: Source, dtype: torch.dtype) -> None:
    """A tied model whose file has a head all the same: silent where it equals the embedding, a warning where not."""
    for name in _spare_head(source):
        pair = (source.by_rows([key], dtype) for key in (name, to_file_name(EMBEDDING, source.keys)))
        if not all(torch.equal(head, embedding) for (*_, head), (*_, embedding) in zip(*pair, strict=True)):
            message = f"{name} differs from the embedding, but tie_word_embeddings is true: it is ignored"
            warnings.warn(message, LlamaMiniWarning, stacklevel=3)


def _spare_head(source: Source) -> list[str]:
    head, embedding = to_file_name(HEAD, source.keys), to_file_name(EMBEDDING, source.keys)
    return (
        [head] if source.config.tie_word_embeddings and head in source.tensors and embedding in source.tensors else []
    )
