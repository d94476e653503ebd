"""Pickled checkpoints, opened only for conversion: opening a pickle can run code, so the engine never does.

`torch.load(weights_only=True)` refuses all but tensors and plain containers. `mmap=True` maps the file, so a conversion
holds one tensor at a time.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.families import has_interleaved_pairs, key_table
from llama_mini.checkpoint.hf.config import read_config
from llama_mini.checkpoint.hf.directory import common_dtype, no_weights, pickles_in
from llama_mini.checkpoint.hf.shards import all_present, complete_shards
from llama_mini.checkpoint.io.file_kind import FileKind, file_kind
from llama_mini.checkpoint.io.files import inside, read_weight_map
from llama_mini.checkpoint.keys import IGNORED_TENSORS, META_KEYS, names_in_file, to_file_name, whole_name
from llama_mini.checkpoint.match import empty_model
from llama_mini.checkpoint.meta.params import read_params
from llama_mini.checkpoint.not_models import check_names
from llama_mini.checkpoint.quantized.methods import check_not_quantized
from llama_mini.checkpoint.rows import split_parts, with_split_pairs
from llama_mini.checkpoint.source import ReadRows, Rows, Source, StoredTensor
from llama_mini.errors import CheckpointFormatError, CheckpointIncompleteError, warn
from llama_mini.machine import dtype_name

Shape = tuple[int, ...]
_WQ = "layers.0.attention.wq.weight"
_META_SHARD = re.compile(r"consolidated\.(\d{2,3})\.pth")


def open_hf_pickles(directory: Path) -> Source:
    """A Hugging Face directory of pytorch_model.bin, in one file or in shards. Raises CheckpointError, ConfigError."""
    config, raw = read_config(directory)
    index = inside(directory, "pytorch_model.bin.index.json")
    if index.is_file():
        files = all_present(directory, sorted(set(read_weight_map(index).values())))
    elif names := pickles_in(directory):
        files = complete_shards(directory, names)
    else:
        raise no_weights(directory, "neither pytorch_model*.bin nor another pickle")
    file_of: dict[str, Path] = {}
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in load_tensors(file).items():
            if name in tensors:
                raise CheckpointFormatError(f"{name} is in both {file_of[name].name} and {file.name}")
            file_of[name], tensors[name] = file, tensor
    keys = names_in_file(key_table(raw["model_type"]), tensors)
    tensors = split_parts(tensors, keys, config, lambda tensor, _, first, n: tensor[first : first + n])
    source = Source(
        path=directory,
        format=f"Hugging Face directory, {len(files)} pickled file{'s' if len(files) > 1 else ''}",
        model_type=raw["model_type"],
        config=config,
        dtype=common_dtype(tensors, lambda tensor: tensor.dtype, raw.get("dtype") or raw.get("torch_dtype")),
        keys=keys,
        tensors={name: stored_tensor(file_of[whole_name(name)], tensor) for name, tensor in tensors.items()},
        read_rows=in_memory(tensors),
    )
    return with_split_pairs(source) if has_interleaved_pairs(source.model_type) else source


def open_meta_pickles(directory: Path, builder: type[nn.Module]) -> Source:
    """Meta's consolidated.NN.pth, one for each model-parallel rank, joined to the shapes of `builder`'s model.

    Raises CheckpointError, ConfigError.
    """
    files = _meta_files(directory)
    shards = [load_tensors(file) for file in files]
    for file, shard in zip(files[1:], shards[1:], strict=True):
        if other := set(shard) ^ set(shards[0]):
            raise CheckpointFormatError(f"{file} and {files[0].name} hold different tensors: {sorted(other)[0]}")
    full_vocabulary = {name: (t.shape[0] * len(shards), *t.shape[1:]) for name, t in shards[0].items() if t.ndim}
    config = read_params(directory, full_vocabulary)
    stored = {name: stored_tensor(files[0], tensor) for name, tensor in shards[0].items()}
    source = Source(
        path=directory,
        format=f"Meta directory, {len(files)} pickled file{'s' if len(files) > 1 else ''}",
        model_type="llama",
        config=config,
        dtype=common_dtype(shards[0], lambda tensor: tensor.dtype),
        keys=META_KEYS,
        tensors=stored,
        read_rows=lambda *_: iter(()),
    )
    model = empty_model(builder, source)
    shapes = {to_file_name(name, META_KEYS): tuple(p.shape) for name, p in model.named_parameters()}
    whole, part = shapes[_WQ], stored[_WQ].shape if _WQ in stored else ()
    if part and part[0] and whole[0] % part[0] == 0 and whole[0] // part[0] > len(files):
        n = whole[0] // part[0]
        raise CheckpointIncompleteError(f"{directory} holds {len(files)} of {n} shards; download the others")
    merges = {name: _merge_of([tuple(s[name].shape) for s in shards], shapes.get(name)) for name in stored}

    def read(names: Collection[str], *_: object) -> Iterator[Rows[Tensor]]:
        for name in names:
            merged = _merged(name, [shard[name] for shard in shards], merges[name])
            yield name, 0, merged

    tensors = {name: t if merges[name] is None else replace(t, shape=shapes[name]) for name, t in stored.items()}
    return with_split_pairs(replace(source, tensors=tensors, read_rows=read))


def _meta_files(directory: Path) -> list[Path]:
    numbers = {int(m[1]): path for path in directory.iterdir() if (m := _META_SHARD.fullmatch(path.name))}
    if not numbers:
        raise CheckpointIncompleteError(f"{directory} has params.json, but no consolidated.00.pth")
    names = [numbers[n].name if n in numbers else f"consolidated.{n:02}.pth" for n in range(max(numbers) + 1)]
    return all_present(directory, names)


def load_tensors(file: Path, of_model: bool = True) -> dict[str, Tensor]:
    """The tensors of a pickle by name. Raises CheckpointFormatError if it holds anything else, or no whole model."""
    if (kind := file_kind(file)) not in (FileKind.PICKLE, FileKind.ARCHIVE, FileKind.OTHER):
        raise CheckpointFormatError(f"{file} is not a PyTorch file but {kind.value}")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise CheckpointFormatError(f"{file} holds more than plain tensors, which could run code: not opened") from None
    except Exception as error:  # torch's unpickler raises whatever its input makes Python raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointFormatError(f"{file} is not a PyTorch file of tensors: {reason}; download it again") from None
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointFormatError(f"{file} holds a {type(tensors).__name__}, not tensors by name")
    texts = [name for name in tensors if isinstance(name, str)]
    if of_model:
        check_names(file, texts)
        check_not_quantized(file, texts)
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointFormatError(f"{file}: {name!r:.80} is a {type(value).__name__}, not a plain tensor")
        if not value.is_floating_point() and not IGNORED_TENSORS.search(name):
            raise CheckpointFormatError(f"{file}: {name} is stored as {value.dtype}, but weights are floats")
    return tensors


def stored_tensor(file: Path, tensor: Tensor) -> StoredTensor:
    return StoredTensor(file, tuple(tensor.shape), dtype_name(tensor.dtype), tensor.nbytes)


def in_memory(tensors: Mapping[str, Tensor]) -> ReadRows:
    """The `Source.read_rows` of tensors that are in memory, or mapped."""
    return lambda names, *_: ((name, 0, tensors[name]) for name in names)


def _merge_of(shapes: list[Shape], joined: Shape | None) -> tuple[int, int] | None:
    """How shards form a tensor of shape `joined`: along which dimension, and how many shards hold the same part
    (-1: all of them). None if they cannot."""
    first, n = shapes[0], len(shapes)
    if joined is None or any(shape != first for shape in shapes) or len(first) != len(joined):
        return None
    if first == joined:
        return 0, -1
    for axis in range(len(joined)):
        others_fit = all(a == b for i, (a, b) in enumerate(zip(first, joined, strict=True)) if i != axis)
        copies, remainder = divmod(first[axis] * n, joined[axis])  # k and v repeat if ranks outnumber KV heads
        if others_fit and remainder == 0 and copies >= 1 and n % copies == 0:
            return axis, copies
    return None


def _merged(name: str, parts: list[Tensor], merge: tuple[int, int] | None) -> Tensor:
    if merge is None:
        return parts[0]
    axis, copies = merge
    if copies == -1:
        if any(not torch.equal(part, parts[0]) for part in parts[1:]):
            warn(f"{name} differs between shards; the first is taken")
        return parts[0]
    return torch.cat(parts[::copies], dim=axis)
