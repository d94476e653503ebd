"""The model in a GGUF file: its metadata as a LlamaConfig, its tensors as the model has them.

What the metadata say is honoured, or known to change nothing, or refused by name.
"""

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.checkpoint.gguf.header import GGUFHeader, TensorInfo, read_header, shown
from llama_mini.checkpoint.gguf.rope import READ_ROPE, gguf_scaling
from llama_mini.checkpoint.gguf.tensors import FLOATS, Blocks, read_blocks, read_tensor
from llama_mini.checkpoint.gguf.tensors import read_rows as read_tensor_rows
from llama_mini.checkpoint.hf.safetensors_data import Room
from llama_mini.checkpoint.keys import GGUF_KEYS
from llama_mini.checkpoint.rotary_layout import split_halves
from llama_mini.checkpoint.source import Rows, Source, StoredTensor, rows_at_once
from llama_mini.errors import CheckpointFormatError, ConfigError, LlamaMiniWarning
from llama_mini.model.config import LlamaConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmo2")  # by the names that the families have too
HEAD = "output.weight"
SIZES = {  # metadata key, after `llama.` -> our name
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "feed_forward_length": "hidden_dim",
    "context_length": "max_seq_len",
}
READ = {*SIZES, "attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"}
READ |= {"attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", *READ_ROPE}
ONLY = {  # settings of which one value is implemented
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
IGNORED = {"tensor_data_layout"}  # tells what the file was made from


def open_gguf(path: Path) -> Source:
    """Raises CheckpointError, ConfigError."""
    header = read_header(path)
    config = gguf_config(header)
    architecture = header.metadata["general.architecture"]
    matrices = {info.type for info in header.tensors.values() if len(info.shape) > 1}
    quantised = sorted(matrices - set(FLOATS))

    def read(names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        with path.open("rb") as file:
            for name in names:
                values = read_tensor(file, header.tensors[name], dtype)
                yield name, _as_the_model_has_it(values, header.tensors[name], config, architecture)

    def read_rows(names: Collection[str], dtype: torch.dtype, _: Room) -> Iterator[Rows[Tensor]]:
        with path.open("rb") as file:
            for name in names:
                info = header.tensors[name]
                if len(info.shape) == 1 or _has_pairs(info, architecture):
                    yield name, 0, _as_the_model_has_it(read_tensor(file, info, dtype), info, config, architecture)
                else:
                    yield from (
                        (name, *rows) for rows in read_tensor_rows(file, info, dtype, rows_at_once(info.shape[-1]))
                    )

    def read_coded(names: Collection[str]) -> Iterator[Rows[Blocks]]:
        with path.open("rb") as file:
            for name in names:
                info = header.tensors[name]
                at_once = info.shape[0] if _has_pairs(info, architecture) else rows_at_once(info.shape[-1])
                for first, blocks in read_blocks(file, info, at_once):
                    rows = _as_the_model_has_it(blocks.rows, info, config, architecture)
                    yield name, first, blocks._replace(rows=rows)

    return Source(
        path=path,
        format=f"GGUF file, {', '.join(sorted(matrices))}",
        model_type=architecture,
        config=config,
        dtype=torch.bfloat16 if quantised or len(matrices) != 1 else FLOATS[matrices.pop()],
        keys=GGUF_KEYS,
        tensors={
            info.name: StoredTensor(path, info.shape, info.type, info.n_bytes)
            for info in sorted(header.tensors.values(), key=lambda info: info.offset)
        },
        read=read,
        read_rows=read_rows,
        read_coded=read_coded,
        gguf=header,
    )


def gguf_config(header: GGUFHeader) -> LlamaConfig:
    """What the metadata describe.

    Raises:
        CheckpointFormatError: the file is not one whole model of a known architecture.
        ConfigError: a setting that is absent, impossible or not implemented; names it.
    """
    try:
        return _config(_Metadata(header), header)
    except ConfigError as error:
        raise ConfigError(f"{header.path}: {error}") from None


def _has_pairs(info: TensorInfo, architecture: str) -> bool:
    """Rotary pairs lie side by side in files of the llama architecture alone; the others have split halves already."""
    return architecture == "llama" and info.name.rpartition(".")[0].endswith((".attn_q", ".attn_k"))


def _as_the_model_has_it(values: Tensor, info: TensorInfo, config: LlamaConfig, architecture: str) -> Tensor:
    if _has_pairs(info, architecture):
        heads = config.n_heads if ".attn_q." in info.name else config.n_kv_heads
        return split_halves(values, heads, info.name)
    return values


def _config(metadata: "_Metadata", header: GGUFHeader) -> LlamaConfig:
    metadata.check_kind()
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointFormatError(f"{header.path}: it has no token_embd.weight, so it is not a whole model")
    vocab_size = metadata.get("vocab_size", embedding.shape[0])
    if vocab_size != embedding.shape[0]:
        raise ConfigError(
            f"{metadata.architecture}.vocab_size is {shown(vocab_size)}, "
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
        bos_id=metadata.token_id("bos"),
        eos_ids=tuple(i for i in [metadata.token_id("eos")] if i is not None),
        pad_id=metadata.spare_token_id("padding", vocab_size),
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(key, config.head_dim) != config.head_dim:
            raise ConfigError(
                f"{metadata.architecture}.{key} is {shown(metadata.get(key))}; "
                f"only the width of a head, {config.head_dim}, is implemented"
            )
    return config


class _Metadata:
    """The metadata, asked for one key at a time."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self.values = header.metadata
        self.architecture: Any = self.values.get("general.architecture")

    def check_kind(self) -> None:
        """A whole model of a known architecture with nothing that is not implemented."""
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise ConfigError(f"general.architecture is {shown(self.architecture)}; known: {', '.join(ARCHITECTURES)}")
        for key, known, do in (
            ("general.type", ("model",), "give the file of the model itself"),
            (
                "split.count",
                (1, 0),
                "merge the parts first, with llama.cpp's llama-gguf-split --merge",
            ),  # which writes 0
        ):
            found = self.values.get(key, known[0])
            if not isinstance(found, int | str) or found not in known:
                raise CheckpointFormatError(f"{self.path}: {key} is {shown(found)}; only {known[0]} can be read; {do}")
        for key, value in self.values.items():
            name = key.removeprefix(f"{self.architecture}.")
            if name == key or name in READ or name in IGNORED:
                continue
            if name not in ONLY:
                raise ConfigError(f"{shown(key)} is {shown(value)}; this setting is not implemented")
            if isinstance(value, np.ndarray) or value != ONLY[name]:
                raise ConfigError(f"{key} is {shown(value)}; only {ONLY[name]!r} is implemented")

    def get(self, name: str, *default: Any) -> Any:
        """The value of `name` of the architecture; without a default it must be there."""
        value = self.values.get(f"{self.architecture}.{name}", *default)
        if isinstance(value, np.ndarray) and len(value) and np.all(value == value[0]):
            value = value[0].item()  # the same for each layer
        if value is None and not default:
            raise ConfigError(f"{self.architecture}.{name} is missing from the metadata")
        if isinstance(value, np.ndarray | list):
            raise ConfigError(
                f"{self.architecture}.{name} holds a value for each layer; one for all layers is implemented"
            )
        return value

    def spare_token_id(self, name: str, vocab_size: int) -> int | None:
        """The same for a token that the model does without: one that does not exist is warned of, as in llama.cpp."""
        value = self.token_id(name)
        if value is None or 0 <= value < vocab_size:
            return value
        warnings.warn(f"{self.path}: {name}_token_id is {value} of {vocab_size} tokens; ignored", LlamaMiniWarning, 4)
        return None

    def token_id(self, name: str) -> int | None:
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and type(value) is not int:
            raise ConfigError(f"tokenizer.ggml.{name}_token_id must be a whole number, not {shown(value)}")
        return value


def shortest(value: Any) -> Any:
    """The short decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value
