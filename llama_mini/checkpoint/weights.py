"""Tensors of a checkpoint directory: what is there, whether it is what the model needs, and reading it once."""

import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from llama_mini.checkpoint.files import read_json, umask
from llama_mini.checkpoint.keys import HARMLESS, KeyTable, hf_name
from llama_mini.dtypes import DTYPES
from llama_mini.errors import (
    CheckpointFormatError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    CheckpointPathError,
    LlamaMiniWarning,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD, EMBEDDING = "lm_head.weight", "tok_embeddings.weight"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not yet read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory by its name in the file; data is not read. Raises CheckpointError."""
    files, expected = _files(directory)
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointIncompleteError(
            f"{directory}: missing {len(missing)} of {len(files)} shards: {', '.join(missing)}"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _tensors_of(file):
            if name in tensors:
                raise CheckpointFormatError(f"{name} is in both {tensors[name].file.name} and {file.name}")
            tensors[name] = stored
    if absent := sorted(expected - set(tensors)):
        raise CheckpointIncompleteError(f"{directory / INDEX} names tensors that no shard holds: {', '.join(absent)}")
    return tensors


def check_depth(directory: Path, tensors: Mapping[str, Stored], n_layers: int) -> None:
    """Refuses a config with more layers than there are tensors, before a model of a billion layers is built."""
    if n_layers > len(tensors):
        raise CheckpointMismatchError(
            f"{directory}: config.json asks for {n_layers} layers, but the files hold {len(tensors)} tensors in all"
        )


def load_tensors(
    model: nn.Module, directory: Path, tensors: dict[str, Stored], table: KeyTable, dtype: torch.dtype, device: str
) -> None:
    """Fills a model that stands on the meta device; each tensor is read once, in the order of the files.

    Raises CheckpointMismatchError that names every missing, unexpected and misshaped tensor at once.
    """
    wanted = {hf_name(name, table): (name, tuple(p.shape)) for name, p in model.named_parameters()}
    head = hf_name(HEAD, table)
    spare_head = tensors.get(head) if head not in wanted else None  # tied, and stored all the same
    present = {name for name in tensors if not HARMLESS.search(name)} - ({head} if spare_head else set())
    _check(directory, wanted, {name: tensors[name].shape for name in present})
    state = {}
    for name, tensor in _read({name: tensors[name] for name in wanted}):
        state[wanted[name][0]] = tensor.to(device=device, dtype=dtype)
    if spare_head is not None:
        for _, tensor in _read({head: spare_head}):
            if not torch.equal(tensor.to(device=device, dtype=dtype), state[EMBEDDING]):
                message = f"{head} differs from the embedding, but tie_word_embeddings is true: it is ignored"
                warnings.warn(message, LlamaMiniWarning, stacklevel=3)
    model.load_state_dict(state, assign=True, strict=True)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes one safetensors file. Raises CheckpointPathError where the disk does not take it."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointPathError(f"cannot write {file}: {error}") from None
    file.chmod(0o666 & ~umask())  # safetensors lets only the owner read


def common_dtype(tensors: Mapping[str, Stored], stated: object) -> torch.dtype:
    """The one dtype a model gets: that of its tensors; where they differ, the config's, else the widest of them."""
    found = {stored.dtype for name, stored in tensors.items() if not HARMLESS.search(name)}
    if len(found) > 1 and isinstance(stated, str) and stated in DTYPES:
        return DTYPES[stated]
    return functools.reduce(torch.promote_types, found) if found else torch.float32


def _files(directory: Path) -> tuple[list[Path], set[str]]:
    """The files to read, and the tensor names that the index promises."""
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise CheckpointFormatError(f"{directory / INDEX} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if name != Path(name).name or name in ("", ".", "..")]:
            raise CheckpointPathError(f"{directory / INDEX} names files outside its directory: {', '.join(outside)}")
        return [directory / name for name in names], set(weight_map)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], set()
    raise CheckpointIncompleteError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def _tensors_of(file: Path) -> Iterator[tuple[str, Stored]]:
    with _open(file) as handle:
        for name in handle.keys():  # noqa: SIM118  (not a dict)
            view = handle.get_slice(name)
            if view.get_dtype() not in STORED:
                known = ", ".join(STORED)
                raise CheckpointFormatError(
                    f"{file}: {name} is stored as {view.get_dtype()}; weights are read from {known}"
                )
            yield name, Stored(file, tuple(view.get_shape()), STORED[view.get_dtype()])


def _read(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        by_file.setdefault(stored.file, []).append(name)
    # The bar shows up only where loading takes long enough to wonder, and only on a terminal.
    with tqdm(total=len(tensors), desc="loading", unit="tensor", delay=1, leave=False, disable=None) as bar:
        for file, names in by_file.items():
            with _open(file) as handle:
                for name in names:
                    try:
                        tensor = handle.get_tensor(name)
                    except (SafetensorError, OSError) as error:  # the file shrank since it was opened
                        raise CheckpointFormatError(f"{file}: {name} cannot be read: {error}") from None
                    yield name, tensor
                    bar.update()


def _open(file: Path) -> safe_open:
    # pread, not a memory map: a file that is edited or cut later must not change the weights or kill the process.
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise CheckpointFormatError(f"{file} is not a readable safetensors file: {error}") from None


def _check(
    directory: Path, wanted: Mapping[str, tuple[str, tuple[int, ...]]], found: Mapping[str, tuple[int, ...]]
) -> None:
    faults = []
    if missing := sorted(set(wanted) - set(found)):
        faults.append(f"{len(missing)} missing: {', '.join(missing)}")
    if unexpected := sorted(set(found) - set(wanted)):
        faults.append(f"{len(unexpected)} unexpected: {', '.join(unexpected)}")
    if misshaped := sorted(name for name in set(wanted) & set(found) if wanted[name][1] != found[name]):
        shapes = [f"{name} is {found[name]}, not {wanted[name][1]}" for name in misshaped]
        faults.append(f"{len(misshaped)} misshaped: {', '.join(shapes)}")
    if faults:
        raise CheckpointMismatchError(f"{directory}: the tensors are not those of its config.json: {'; '.join(faults)}")
