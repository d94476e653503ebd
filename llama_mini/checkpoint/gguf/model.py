"""The model in a GGUF file: its metadata as a LlamaConfig, its tensors in the model's layout.

A setting in the metadata is honoured, ignored because it changes nothing, or refused by name.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.checkpoint.gguf.architectures import ARCHITECTURES
from llama_mini.checkpoint.gguf.header import GGUFHeader, GGUFTensor, read_header
from llama_mini.checkpoint.gguf.metadata import Metadata
from llama_mini.checkpoint.gguf.rope import gguf_scaling, name_tensors
from llama_mini.checkpoint.gguf.tensors import CHUNK, FLOATS, kept, read_blocks, read_rows, read_tensor
from llama_mini.checkpoint.not_models import describe_gguf
from llama_mini.checkpoint.rows import split_parts, with_split_pairs
from llama_mini.checkpoint.source import Destination, Rows, Source, StoredCodes, StoredTensor, rows_per_chunk
from llama_mini.checkpoint.special_ids import gguf_special_ids
from llama_mini.errors import CheckpointFormatError, ConfigError, errors_about
from llama_mini.model.config import LlamaConfig
from llama_mini.validate import check_choice, short_repr

HEAD = "output.weight"
SIZES = {  # metadata key, after `llama.` -> our name
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "feed_forward_length": "hidden_dim",
    "context_length": "max_seq_len",
}


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file. Raises CheckpointError, ConfigError."""
    header = read_header(path)
    config = gguf_config(header)
    architecture = ARCHITECTURES[header.metadata["general.architecture"]]
    keys = architecture.keys(header.tensors)
    with errors_about(path):
        tensors = split_parts(header.tensors, keys, config, _cut)
    matrix_types = {tensor.type for tensor in tensors.values() if len(tensor.shape) > 1}
    is_quantized = not matrix_types <= set(FLOATS)
    final = config.norm_plan.final
    adds_one = final is not None and final.gain == "1+w"  # such a file holds 1 + w

    def read(names: Collection[str], dtype: torch.dtype, _: Destination, whole: bool) -> Iterator[Rows[Tensor]]:
        with path.open("rb") as file:
            for name in names:
                tensor = tensors[name]
                if adds_one and name.endswith("norm.weight"):
                    yield name, 0, (read_tensor(file, tensor) - 1).to(dtype)
                elif whole or len(tensor.shape) == 1:
                    yield name, 0, read_tensor(file, tensor, dtype)
                else:
                    for first, rows in read_rows(file, tensor, dtype, rows_per_chunk(tensor.shape[-1], CHUNK)):
                        yield name, first, rows

    def read_quantized(names: Collection[str]) -> Iterator[Rows[StoredCodes]]:
        with path.open("rb") as file:
            for name in names:
                at_once = rows_per_chunk(tensors[name].shape[-1], CHUNK)
                for first, blocks in read_blocks(file, tensors[name], at_once):
                    yield name, first, blocks

    source = Source(
        path=path,
        format=f"GGUF file, {', '.join(sorted(matrix_types))}",
        model_type=architecture.family,
        config=config,
        dtype=torch.bfloat16 if is_quantized or len(matrix_types) != 1 else FLOATS[matrix_types.pop()],
        keys=keys,
        tensors={
            tensor.name: StoredTensor(path, tensor.shape, tensor.type, tensor.n_bytes, *kept(tensor.type))
            for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset)
        },
        read_rows=read,
        read_quantized=read_quantized,
        gguf=header,
    )
    sections = header.metadata.get("glm4.rope.dimension_sections")
    is_split = isinstance(sections, np.ndarray) and sections.any()  # the converter splits the pairs of GLM-4V
    return with_split_pairs(source) if architecture.pairs and not is_split else source


def _cut(tensor: GGUFTensor, name: str, first: int, n: int) -> GGUFTensor:
    """`n` rows of a tensor, as a tensor of its own."""
    row_bytes, rest = divmod(tensor.n_bytes, tensor.shape[0])
    if rest:  # a row of blocks, which no bias is
        raise CheckpointFormatError(f"{tensor.name} is {tensor.type}, whose rows cannot be told apart")
    shape, offset = (n, *tensor.shape[1:]), tensor.offset + first * row_bytes
    return tensor._replace(name=name, shape=shape, offset=offset, n_bytes=n * row_bytes)


def gguf_config(header: GGUFHeader) -> LlamaConfig:
    """The configuration that the metadata describe.

    Raises:
        CheckpointFormatError: the file is not a whole model.
        ConfigError: names a setting that is absent, impossible or not implemented, or an unknown architecture.
    """
    if (what := describe_gguf(header)) is not None:
        raise CheckpointFormatError(f"{header.path}: {what}")
    try:
        metadata = Metadata(header)
        check_choice("general.architecture", metadata.architecture, tuple(ARCHITECTURES), ConfigError)
        config = _config(metadata, header)
        metadata.check_all_read()
        return config
    except ConfigError as error:
        raise ConfigError(f"{header.path}: {name_tensors(str(error), header)}") from None


def _config(metadata: Metadata, header: GGUFHeader) -> LlamaConfig:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointFormatError(f"{header.path}: it has no token_embd.weight, so it is not a whole model")
    vocab_size = metadata.get("vocab_size", embedding.shape[0])
    if vocab_size != embedding.shape[0]:
        rows = f"token_embd.weight has {embedding.shape[0]} rows"
        raise ConfigError(f"{metadata.architecture}.vocab_size is {short_repr(vocab_size)}, but {rows}")
    architecture = ARCHITECTURES[metadata.architecture]
    plan = FAMILIES[architecture.family].norms
    eps = "layer_norm" if plan.final is not None and plan.final.kind == "layer" else "layer_norm_rms"
    sizes = {ours: metadata.get(key) for key, ours in SIZES.items()}
    theta = metadata.get("rope.freq_base", 10_000.0)
    config = LlamaConfig(
        **sizes,
        n_kv_heads=metadata.get("attention.head_count_kv", sizes["n_heads"]),
        head_dim=metadata.get("attention.key_length", None),
        vocab_size=vocab_size,
        norm_eps=metadata.get(f"attention.{eps}_epsilon"),
        rope_theta=theta,
        rotary_dim=metadata.get("rope.dimension_count", None),
        rope_scaling=gguf_scaling(metadata.get, header, sizes["max_seq_len"], theta),
        qkv_bias=any(f"blk.0.attn_{name}.bias" in header.tensors for name in ("q", "qkv")),
        o_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_down.bias" in header.tensors,
        tie_word_embeddings=HEAD not in header.tensors,
        norm_plan=plan,
        **gguf_special_ids(header.metadata, vocab_size, header.path),
    )
    width = config.head_dim
    for key in ("attention.value_length", *([] if architecture.partial else ["rope.dimension_count"])):
        if metadata.get(key, width) != width:
            found = f"{metadata.architecture}.{key} is {short_repr(metadata.get(key))}"
            raise ConfigError(f"{found}; only the width of a head, {width}, is implemented")
    own = architecture.settings(config, metadata)
    if own.get("attention_scale") == config.head_dim**-0.5:
        del own["attention_scale"]  # the usual one, which the fused operators know
    return replace(config, **own)
