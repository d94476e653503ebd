"""A Meta directory: params.json and `consolidated.safetensors`. Pickles must be converted first."""

from collections.abc import Collection, Iterator
from pathlib import Path

from torch import Tensor

from llama_mini.checkpoint.hf.directory import common_dtype, no_weights
from llama_mini.checkpoint.hf.safetensors_data import read_rows
from llama_mini.checkpoint.hf.safetensors_header import weight_dtype
from llama_mini.checkpoint.hf.shards import complete_shards, read_headers, stored
from llama_mini.checkpoint.keys import IGNORED_TENSORS, META_KEYS
from llama_mini.checkpoint.meta.params import read_params
from llama_mini.checkpoint.source import Rows, Source, to_split_half_rope
from llama_mini.model.config import LlamaConfig


def open_meta_directory(directory: Path) -> Source:
    """Opens a Meta directory. Raises CheckpointError, ConfigError."""
    names = sorted(path.name for path in directory.glob("consolidated*.safetensors"))
    if not names:
        raise no_weights(directory, "params.json, but neither consolidated.safetensors nor *.pth")
    files = complete_shards(directory, names)
    tensors = read_headers(files)
    config = read_params(directory, {name: tensor.shape for name, tensor in tensors.items()})

    def read(names: Collection[str], *_: object) -> Iterator[Rows[Tensor]]:
        for tensor, _first, stored_values in read_rows(tensors[name] for name in names):
            values = split_half_rope(tensor.name, stored_values, config)
            del stored_values  # `values` may be a copy
            yield tensor.name, 0, values
            del values  # before the next one is read

    return Source(
        path=directory,
        format=f"Meta directory, {len(files)} safetensors file{'s' if len(files) > 1 else ''}",
        model_type="llama",
        config=config,
        dtype=common_dtype([weight_dtype(t) for name, t in tensors.items() if not IGNORED_TENSORS.search(name)], None),
        keys=META_KEYS,
        tensors=stored(tensors),
        read_rows=read,
    )


def split_half_rope(name: str, values: Tensor, config: LlamaConfig) -> Tensor:
    """A tensor in the model's layout. Only q and k differ: in Meta's files, rotary pairs lie side by side."""
    if name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return to_split_half_rope(values, config.n_heads if ".wq." in name else config.n_kv_heads, name)
    return values
