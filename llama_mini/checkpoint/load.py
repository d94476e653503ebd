"""An opened checkpoint as a model and a tokenizer, and a model as a checkpoint."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from llama_mini.checkpoint.families import key_table
from llama_mini.checkpoint.gguf.tensors import Blocks
from llama_mini.checkpoint.hf.config import special_ids, to_hf
from llama_mini.checkpoint.hf.safetensors_data import write_file
from llama_mini.checkpoint.io.atomic import new_directory
from llama_mini.checkpoint.io.files import SINGLE, write_json
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.checkpoint.source import Model, Source, empty_model, match, read_all, warn_of_other_head
from llama_mini.errors import CheckpointFormatError, RequestError
from llama_mini.machine import as_dtype, dtype_name
from llama_mini.memory import check_fits
from llama_mini.model.llama import Llama


class Place(Protocol):
    """Where a tensor of the plain model goes instead of a parameter; `keeps`: number formats that it takes as codes."""

    @property
    def keeps(self) -> Collection[str]: ...

    def room(self, first: int, n: int) -> Tensor | None:
        """Where n rows from `first` on lie, if they stay numbers."""
        ...

    def put(self, tensor: Tensor | Blocks, first: int) -> None: ...


Fuse = Callable[[Llama, torch.dtype, torch.device], Mapping[str, Place]]


def load_model(
    cls: type[Model],
    source: Source,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    fuse: Fuse | None = None,
    quantize: str | None = None,
) -> Model:
    """An opened checkpoint as a model in eval mode without gradients; see `Llama.from_pretrained`.

    fuse: replaces modules of the empty model and says what takes the tensors that they hold; some rows of one tensor
        are in memory beside them at a time. quantize: the format that it gives them.
    """
    wanted = source.dtype if dtype is None else as_dtype(dtype, device)
    model = empty_model(cls, source)
    names = match(model, source)
    n_parameters = sum(p.numel() for p in model.parameters())
    check_fits(source.config, n_parameters, wanted, 1, torch.device(device), quantize=quantize)
    places = {} if fuse is None else fuse(model, wanted, torch.device(device))
    doing = "loading" if quantize is None else f"quantising to {quantize}"
    coded = [name for name in names if names[name] in places and _kept(source, name, places[names[name]])]
    with tqdm(total=len(coded), desc=doing, unit="tensor", delay=1, leave=False, disable=None) as bar:
        for theirs, first, blocks in source.read_coded(coded):
            _put(places, names[theirs], blocks, first, source)
            bar.update(first == 0)
    rest = {theirs: ours for theirs, ours in names.items() if theirs not in coded}
    plain = {ours: p.shape for ours, p in model.named_parameters() if ours not in places}
    # Before anything is read: small things between large ones that come and go leave holes in memory.
    state = {ours: torch.empty(shape, dtype=wanted, device=device) for ours, shape in plain.items()}

    def room(theirs: str, first: int, shape: tuple[int, ...]) -> Tensor | None:
        ours = names[theirs]
        return places[ours].room(first, shape[0]) if ours in places else state[ours][first : first + shape[0]]

    for ours, first, rows in read_all(source, rest, wanted, doing, room=room):
        if ours in places:
            _put(places, ours, rows, first, source)
    warn_of_other_head(source, wanted)
    model.load_state_dict(state, assign=True, strict=True)
    return model.to(device).eval().requires_grad_(False)


def _put(places: Mapping[str, Place], ours: str, rows: Tensor | Blocks, first: int, source: Source) -> None:
    try:
        places[ours].put(rows, first)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{source.path}: {ours}: {error}; load it without --quantize") from None


def _kept(source: Source, name: str, place: Place) -> bool:
    return source.tensors[name].number_format in place.keeps


def save_model(model: Llama, path: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors; see `Llama.save_pretrained`."""
    with torch.device("meta"):
        described = Llama(model.config)
    if replaced := {name for name, _ in described.named_parameters()} - {name for name, _ in model.named_parameters()}:
        raise RequestError(
            f"{min(replaced)} was replaced, so the model cannot be saved: load the checkpoint plain, with "
            "Llama.from_pretrained, and save that"
        )
    raw = to_hf(model.config, dtype_name(model.dtype))
    table = key_table(raw["model_type"])
    parameters = {to_file_name(name, table): p.detach() for name, p in model.named_parameters()}
    with new_directory(path) as directory:
        write_json(directory / "config.json", raw)
        write_json(directory / "generation_config.json", special_ids(model.config))
        write_file(
            directory / SINGLE,
            ((name, p.dtype, tuple(p.shape)) for name, p in parameters.items()),
            (p.cpu().contiguous() for p in parameters.values()),
            {"format": "pt"},
        )
