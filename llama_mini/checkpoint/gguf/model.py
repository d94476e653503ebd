"""The model in a GGUF file: its metadata as a LlamaConfig, its tensors in the model's layout.

A setting in the metadata is honoured, ignored because it changes nothing, or refused by name.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.checkpoint.gguf.header import GGUFHeader, read_header
from llama_mini.checkpoint.gguf.rope import ROPE_KEYS, gguf_scaling, name_tensors
from llama_mini.checkpoint.gguf.tensors import FLOATS, kept, read_blocks, read_rows, read_tensor
from llama_mini.checkpoint.keys import GGUF_KEYS
from llama_mini.checkpoint.not_models import describe_gguf
from llama_mini.checkpoint.rows import with_split_pairs
from llama_mini.checkpoint.source import (
    Destination,
    Rows,
    Source,
    StoredCodes,
    StoredTensor,
    rows_per_chunk,
)
from llama_mini.checkpoint.special_ids import gguf_special_ids
from llama_mini.errors import CheckpointFormatError, ConfigError
from llama_mini.model.config import LlamaConfig
from llama_mini.validate import check_choice, short_repr

ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmo2")  # these are also names of families
HEAD = "output.weight"
SIZES = {  # metadata key, after `llama.` -> our name
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "feed_forward_length": "hidden_dim",
    "context_length": "max_seq_len",
}
READ_KEYS = {*SIZES, "attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"}
READ_KEYS |= {"attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", *ROPE_KEYS}
FIXED_KEYS = {  # only this value is implemented
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
    "logit_scale": 1,
    "pooling_type": 0,
    "use_parallel_residual": False,
}
IGNORED_KEYS = {"tensor_data_layout"}  # names the layout of the file that this one was converted from


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file. Raises CheckpointError, ConfigError."""
    header = read_header(path)
    config = gguf_config(header)
    matrix_types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    is_quantized = not matrix_types <= set(FLOATS)

    def read(names: Collection[str], dtype: torch.dtype, _: Destination, whole: bool) -> Iterator[Rows[Tensor]]:
        with path.open("rb") as file:
            for name in names:
                tensor = header.tensors[name]
                if whole or len(tensor.shape) == 1:
                    yield name, 0, read_tensor(file, tensor, dtype)
                else:
                    for first, rows in read_rows(file, tensor, dtype, rows_per_chunk(tensor.shape[-1])):
                        yield name, first, rows

    def read_quantized(names: Collection[str]) -> Iterator[Rows[StoredCodes]]:
        with path.open("rb") as file:
            for name in names:
                tensor = header.tensors[name]
                for first, blocks in read_blocks(file, tensor, rows_per_chunk(tensor.shape[-1])):
                    yield name, first, blocks

    source = Source(
        path=path,
        format=f"GGUF file, {', '.join(sorted(matrix_types))}",
        model_type=header.metadata["general.architecture"],
        config=config,
        dtype=torch.bfloat16 if is_quantized or len(matrix_types) != 1 else FLOATS[matrix_types.pop()],
        keys=GGUF_KEYS,
        tensors={
            tensor.name: StoredTensor(path, tensor.shape, tensor.type, tensor.n_bytes, *kept(tensor.type))
            for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset)
        },
        read_rows=read,
        read_quantized=read_quantized,
        gguf=header,
    )
    return with_split_pairs(source) if source.model_type == "llama" else source


def gguf_config(header: GGUFHeader) -> LlamaConfig:
    """The configuration that the metadata describe.

    Raises:
        CheckpointFormatError: the file is not a whole model.
        ConfigError: names a setting that is absent, impossible or not implemented, or an unknown architecture.
    """
    try:
        return _config(_Metadata(header), header)
    except ConfigError as error:
        raise ConfigError(f"{header.path}: {name_tensors(str(error), header)}") from None


def _config(metadata: "_Metadata", header: GGUFHeader) -> LlamaConfig:
    if (what := describe_gguf(header)) is not None:
        raise CheckpointFormatError(f"{header.path}: {what}")
    metadata.check_keys()
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointFormatError(f"{header.path}: it has no token_embd.weight, so it is not a whole model")
    vocab_size = metadata.get("vocab_size", embedding.shape[0])
    if vocab_size != embedding.shape[0]:
        raise ConfigError(
            f"{metadata.architecture}.vocab_size is {short_repr(vocab_size)}, "
            f"but token_embd.weight has {embedding.shape[0]} rows"
        )
    sizes = {ours: metadata.get(key) for key, ours in SIZES.items()}
    theta = shortest(metadata.get("rope.freq_base", 10_000.0))
    config = LlamaConfig(
        **sizes,
        n_kv_heads=metadata.get("attention.head_count_kv", sizes["n_heads"]),
        head_dim=metadata.get("attention.key_length", None),
        vocab_size=vocab_size,
        norm_eps=shortest(metadata.get("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=gguf_scaling(metadata.get, header, sizes["max_seq_len"], theta),
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        o_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_down.bias" in header.tensors,
        tie_word_embeddings=HEAD not in header.tensors,
        norm_plan=FAMILIES[metadata.architecture].norm_plan(1),
        **gguf_special_ids(header.metadata, vocab_size, header.path),
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(key, config.head_dim) != config.head_dim:
            raise ConfigError(
                f"{metadata.architecture}.{key} is {short_repr(metadata.get(key))}; "
                f"only the width of a head, {config.head_dim}, is implemented"
            )
    return config


class _Metadata:
    """The metadata, read one key at a time."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self.values = header.metadata
        self.architecture: Any = self.values.get("general.architecture")

    def check_keys(self) -> None:
        """Refuses an unknown architecture, and settings that are not implemented."""
        check_choice("general.architecture", self.architecture, ARCHITECTURES, ConfigError)
        for key, value in self.values.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name == key or name in READ_KEYS or name in IGNORED_KEYS:
                continue
            if name not in FIXED_KEYS:
                raise ConfigError(f"{key:.80} is {short_repr(value)}; this setting is not implemented")
            if isinstance(value, np.ndarray) or value != FIXED_KEYS[name]:
                raise ConfigError(f"{key} is {short_repr(value)}; only {FIXED_KEYS[name]!r} is implemented")

    def get(self, name: str, *default: Any) -> Any:
        """The value of `<architecture>.<name>`, which is required where there is no default."""
        value = self.values.get(f"{self.architecture}.{name}", *default)
        if isinstance(value, np.ndarray) and len(value) and np.all(value == value[0]):
            value = value[0].item()  # one value for each layer, all the same
        if value is None and not default:
            raise ConfigError(f"{self.architecture}.{name} is missing from the metadata")
        if isinstance(value, np.ndarray | list):
            raise ConfigError(
                f"{self.architecture}.{name} holds a value for each layer; only one value for all layers is implemented"
            )
        return value


def shortest(value: Any) -> Any:
    """The short decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value
