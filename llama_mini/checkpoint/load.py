"""An opened checkpoint -> a model in memory, and a model -> a checkpoint."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.hf.config import to_hf
from llama_mini.checkpoint.hf.directory import common_dtype
from llama_mini.checkpoint.hf.safetensors_data import write_file
from llama_mini.checkpoint.io.atomic import new_directory
from llama_mini.checkpoint.io.files import SINGLE, write_json
from llama_mini.checkpoint.match import Model, empty_model, match, read_all, with_progress
from llama_mini.checkpoint.plain import check_contents, check_plain
from llama_mini.checkpoint.rows import rows_for_file
from llama_mini.checkpoint.source import Source, StoredCodes
from llama_mini.checkpoint.special_ids import special_ids
from llama_mini.checkpoint.weight_formats import column_orders, keeps_codes, weight_bytes, weight_formats
from llama_mini.errors import CheckpointFormatError
from llama_mini.machine import as_device, as_dtype, dtype_name
from llama_mini.memory import check_fits
from llama_mini.model.config import LlamaConfig


class WeightSink(Protocol):
    """Takes the rows of a weight in place of a parameter, for example a packed weight of optimize/."""

    def destination(self, first: int, n: int) -> Tensor | None:
        """The memory for `n` rows from `first` on; None if they are not kept as floats."""
        ...

    def load(self, tensor: Tensor | StoredCodes, first: int) -> None:
        """Stores rows from `first` on. Rows that were read into `destination` are already in place."""
        ...


# (empty model, dtype, device, the formats of its matrices, orders=that of their columns where it is not the plain one)
# -> sinks, each under the name of the parameter it replaces
Fuse = Callable[..., Mapping[str, WeightSink]]
Parameters = Iterable[tuple[str, Tensor]]  # with our names


def load_model(
    cls: type[Model],
    source: Source,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    fuse: Fuse | None = None,
    quantize: str = "none",
) -> Model:
    """An opened checkpoint as a model in eval mode without gradients; see `Llama.from_pretrained`.

    `fuse` replaces modules of the empty model with faster ones, whose weights are in the formats that `quantize` means
    for this checkpoint. A matrix is read and packed in chunks of rows, so memory holds the model and a few MB, never a
    tensor twice.
    """
    dtype, device = source.dtype if dtype is None else as_dtype(dtype, device), as_device(device)
    model = empty_model(cls, source)
    names = match(model, source)  # name in the file -> ours
    check_fits(source.config, partial(weight_bytes, source), dtype, 1, device, quantize=quantize)

    formats = weight_formats(source, quantize)
    orders = column_orders(source, formats)
    sinks = {} if fuse is None else fuse(model, dtype, device, formats, orders=orders)
    # Allocated before anything is read: allocated between short-lived chunks, they would fragment memory.
    state = {
        name: torch.empty(p.shape, dtype=dtype, device=device)
        for name, p in model.named_parameters()
        if name not in sinks
    }

    def load(name: str, rows: Tensor | StoredCodes, first: int) -> None:
        try:
            sinks[name].load(rows, first)
        except CheckpointFormatError as error:
            raise CheckpointFormatError(f"{source.path}: {name}: {error}; load it with --quantize none") from None

    def destination(file_name: str, first: int, shape: tuple[int, ...]) -> Tensor | None:
        name = names[file_name]
        return sinks[name].destination(first, shape[0]) if name in sinks else state[name][first : first + shape[0]]

    what = f"quantising to {quantize}" if quantize in ("int8", "int4") else "loading"
    as_codes = [f for f, name in names.items() if keeps_codes(source.tensors[f], formats.get(name), name in orders)]
    for file_name, first, codes in with_progress(source.read_quantized(as_codes), len(as_codes), what):
        load(names[file_name], codes, first)
    # A tensor that is quantised again is not rounded to the model's dtype in between.
    again = {f: name for f, name in names.items() if f not in as_codes and source.tensors[f].kept and name in formats}
    others = {f: name for f, name in names.items() if f not in as_codes and f not in again}
    for each, read_as in ((again, torch.float32), (others, dtype)):
        for name, first, rows in read_all(source, each, read_as, what, destination=destination):
            if name in sinks:
                load(name, rows, first)
    model.load_state_dict(state, assign=True, strict=True)
    return model.to(device).eval().requires_grad_(False)


def save_model(model: nn.Module, path: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors; see `Llama.save_pretrained`."""
    config = model.config
    assert isinstance(config, LlamaConfig)
    check_plain(model)
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    check_contents(model, parameters)
    raw = to_hf(config, dtype_name(common_dtype(parameters, attrgetter("dtype"))))  # which rounds none of them
    with new_directory(path) as directory:
        write_json(directory / "config.json", raw)
        write_json(directory / "generation_config.json", special_ids(config))
        empty = ((name, p.to("meta")) for name, p in parameters.items())
        write_parameters(directory / SINGLE, raw["model_type"], config, empty, parameters.items())


def write_parameters(
    path: Path, model_type: str, config: LlamaConfig, empty: Parameters, parameters: Parameters
) -> None:
    """Writes safetensors with the family's names, one tensor at a time; `empty`: the same ones on the meta device."""
    entries = [(name, p.dtype, tuple(p.shape)) for name, p in rows_for_file(empty, model_type, config)]
    write_file(path, entries, (p.cpu().contiguous() for _, p in rows_for_file(parameters, model_type, config)))
