"""The files of an adapter: which of its tensors change which weight, and how they are read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from llama_mini.checkpoint.adapters.config import AdapterConfig, read_adapter_config
from llama_mini.checkpoint.hf.safetensors_data import reader, stored
from llama_mini.checkpoint.io.files import ADAPTER_CONFIG, ADAPTERS, exists, inside
from llama_mini.checkpoint.io.safetensors_header import read_header, weight_dtype
from llama_mini.checkpoint.source import ReadRows, StoredTensor
from llama_mini.errors import CheckpointFormatError, CheckpointIncompleteError, warn
from llama_mini.validate import join_names, short_repr

# a, b: W + scale · B·A, B (rows, rank), A (rank, columns). magnitude: DoRA's length of each row, or of each column of
# an embedding. tokens: some rows. whole: the weight itself, in place of the model's.
Role = Literal["a", "b", "magnitude", "tokens", "whole"]
_ROLES: dict[str, tuple[Role, bool]] = {  # in a tensor's name -> its role, and whether it is transposed
    "lora_A": ("a", False),
    "lora_B": ("b", False),
    "lora_embedding_A": ("b", True),
    "lora_embedding_B": ("a", True),
    "lora_magnitude_vector": ("magnitude", False),
    "token_adapter.trainable_tokens_delta": ("tokens", False),
    "lora_a": ("a", True),  # of mlx-lm
    "lora_b": ("b", True),
    "m": ("magnitude", False),
}
# The second group is the adapter's name in PEFT, mostly `default`.
_PART = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ROLES))})(?:\.(?!weight$)\w+)?(?:\.weight)?")
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_WHOLE = re.compile(r"\.(base_layer|modules_to_save(\.(?!weight$|bias$)\w+)?)(?=\.(weight|bias)$)")
_PEFT = "base_model.model."


class Part(NamedTuple):
    """A tensor of an adapter. It is stored transposed, or not."""

    name: str
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An opened adapter.

    weight: the share of its change that is added to the model.
    tensors: by name in the file.
    changes: a weight, by its name in the model of transformers, model.norm.weight -> the tensors that change it.
    read_rows: reads its tensors, as `Source.read_rows` does.
    """

    path: Path
    weight: float
    config: AdapterConfig
    tensors: Mapping[str, StoredTensor]
    changes: Mapping[str, Mapping[Role, Part]]
    read_rows: ReadRows

    def describe(self) -> str:
        """For people: what it changes."""
        matrices = sum("a" in parts for parts in self.changes.values())
        rank = f" of rank {self.config.rank} on {matrices} matrices" if matrices else ""
        whole = len(self.changes) - matrices
        also = f"{' and' if matrices else ''} {whole} whole tensors" if whole else ""
        return f"{self.config.kind}{rank}{also}, {self.weight:g} × {self.path}"


def open_adapter(path: Path, weight: float, pickles: bool) -> Adapter:
    """Opens the directory of an adapter. Reads headers only; `pickles` allows adapter_model.bin, for conversion.

    Raises CheckpointError, ConfigError.
    """
    directory = path if path.is_dir() else path.parent
    if not exists(inside(directory, ADAPTER_CONFIG)):
        raise CheckpointIncompleteError(f"{path} has no {ADAPTER_CONFIG}, so it is not an adapter of PEFT or mlx-lm")
    config = read_adapter_config(directory)
    tensors, read = _tensors(directory, pickles)
    changes: dict[str, dict[Role, Part]] = {}
    for name in tensors:
        target, role, part = _part(name, config)
        if role in (parts := changes.setdefault(target, {})):
            both = f"{short_repr(parts[role].name)} and {short_repr(name)}"
            raise CheckpointFormatError(f"{directory} holds {both} for one weight; keep one adapter")
        parts[role] = part
    adapter = Adapter(path=directory, weight=weight, config=config, tensors=tensors, changes=changes, read_rows=read)
    _check(adapter)
    return adapter


def _tensors(directory: Path, pickles: bool) -> tuple[dict[str, StoredTensor], ReadRows]:
    names = [name for name in ADAPTERS if exists(inside(directory, name))]
    if not names:
        raise CheckpointIncompleteError(f"{directory} has {ADAPTER_CONFIG}, but none of {', '.join(ADAPTERS)}")
    file = inside(directory, names[0])
    if names[0].endswith(".bin"):
        if not pickles:
            why = f"{names[0]}, which can run code when it is opened"
            do = f"merge it once: llama-mini convert MODEL NEW_DIRECTORY --adapter {directory}"
            raise CheckpointFormatError(f"{directory} holds its adapter as a pickle, {why}; {do}")
        from llama_mini.checkpoint.meta.pickles import in_memory, load_tensors, stored_tensor  # for conversion only

        loaded = load_tensors(file, of_model=False)
        return {name: stored_tensor(file, tensor) for name, tensor in loaded.items()}, in_memory(loaded)
    header = read_header(file)
    for tensor in header.values():
        weight_dtype(tensor)  # refused now, not when it is read
    return stored(header), reader(header)


def _part(name: str, config: AdapterConfig) -> tuple[str, Role, Part]:
    """A tensor's weight, its role, and the tensor."""
    plain = _WRAPPERS.sub("", name).removeprefix(_PEFT)
    if (match := _PART.fullmatch(plain)) is None or (match[2] == "m" and not config.is_mlx):
        return _WHOLE.sub("", plain), "whole", Part(name, False)
    role, transposed = _ROLES[match[2]]
    if config.is_mlx and match[1].endswith("embed_tokens") and role in ("a", "b"):  # A is looked up: it has the rows
        role, transposed = ("b" if role == "a" else "a"), False
    return f"{match[1]}.weight", role, Part(name, transposed)


def _check(adapter: Adapter) -> None:
    """Refuses halves of a pair and ranks that the configuration does not state; warns of patterns without effect."""
    config, where = adapter.config, adapter.path
    modules = [name.removesuffix(".weight") for name, parts in adapter.changes.items() if "a" in parts]
    for target, parts in adapter.changes.items():
        if (found := parts.keys() & {"a", "b", "magnitude"}) and not found >= {"a", "b"}:
            names = join_names(parts[role].name for role in sorted(found))
            raise CheckpointIncompleteError(f"{where} holds {names}, but not both A and B of it; download it again")
        if "a" not in parts:
            continue
        rank = config.rank_of(target.removesuffix(".weight"))
        for part, axis in ((parts["a"], 0), (parts["b"], 1)):
            shape = adapter.tensors[part.name].shape
            if len(shape) != 2 or shape[1 - axis if part.transposed else axis] != rank:
                stated = f"its rank should be {rank}, as {ADAPTER_CONFIG} says; download both again"
                raise CheckpointFormatError(f"{where}: {part.name} is {shape}, but {stated}")
    for key, patterns in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        if idle := [p.pattern[12:-1] for p, _ in patterns if not any(map(p.fullmatch, modules))]:
            warn(f"{where}: {key} names {join_names(idle)}, which the adapter does not change")
