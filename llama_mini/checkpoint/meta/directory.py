"""A Meta directory: params.json and `consolidated.safetensors`. Pickles must be converted first."""

from pathlib import Path

from llama_mini.checkpoint.hf.directory import common_dtype, no_weights
from llama_mini.checkpoint.hf.safetensors_data import reader, stored
from llama_mini.checkpoint.hf.shards import complete_shards, read_headers
from llama_mini.checkpoint.io.safetensors_header import weight_dtype
from llama_mini.checkpoint.keys import META_KEYS
from llama_mini.checkpoint.meta.params import read_params
from llama_mini.checkpoint.quantized.methods import check_not_quantized
from llama_mini.checkpoint.rows import with_split_pairs
from llama_mini.checkpoint.source import Source


def open_meta_directory(directory: Path) -> Source:
    """Opens a Meta directory. Raises CheckpointError, ConfigError."""
    names = sorted(path.name for path in directory.glob("consolidated*.safetensors"))
    if not names:
        raise no_weights(directory, "params.json, but neither consolidated.safetensors nor *.pth")
    files = complete_shards(directory, names)
    tensors = read_headers(files)
    check_not_quantized(directory, tensors)
    config = read_params(directory, {name: tensor.shape for name, tensor in tensors.items()})
    source = Source(
        path=directory,
        format=f"Meta directory, {len(files)} safetensors file{'s' if len(files) > 1 else ''}",
        model_type="llama",
        config=config,
        dtype=common_dtype(tensors, weight_dtype),
        keys=META_KEYS,
        tensors=stored(tensors),
        read_rows=reader(tensors),
    )
    return with_split_pairs(source)
