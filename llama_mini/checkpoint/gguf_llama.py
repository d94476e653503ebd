"""The llama architecture in a GGUF file: its metadata as a LlamaConfig, its tensors under their Hugging Face names.

What the metadata say is honoured, or known to change nothing, or refused by name.
"""

from typing import Any, BinaryIO

import numpy as np

from llama_mini.checkpoint.gguf_file import GGUFHeader, TensorInfo, read_tensor, shown
from llama_mini.config import LlamaConfig
from llama_mini.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError

NAMES = {  # GGUF name -> Hugging Face name; `{}` is the number of the layer
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
HEAD = "output.weight"

SIZES = {  # metadata key, after `llama.` -> our name
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "feed_forward_length": "hidden_dim",
    "context_length": "max_seq_len",
}
READ = {*SIZES, "attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"}
READ |= {"attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"}
ONLY = {  # settings of which one value is implemented
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,  # the older word for the same
}
HARMLESS = {"tensor_data_layout"}  # tells what the file was made from


def llama_config(header: GGUFHeader) -> LlamaConfig:
    """What the metadata describe.

    Raises:
        CheckpointFormatError: the file is not one whole model of the llama architecture.
        ConfigError: a setting that is absent, impossible or not implemented; names it.
    """
    try:
        return _config(_Metadata(header), header)
    except ConfigError as error:
        raise ConfigError(f"{header.path}: {error}") from None


def llama_tensors(header: GGUFHeader, config: LlamaConfig) -> dict[str, TensorInfo]:
    """The tensors of the file by their Hugging Face names.

    Raises CheckpointMismatchError that names all that are missing and all that the llama architecture does not have.
    """
    layers = range(config.n_layers)
    wanted = {
        gguf.format(i): hf.format(i)
        for gguf, hf in NAMES.items()
        for i in (layers if "{}" in gguf else [0])
        if gguf != HEAD or not config.tie_word_embeddings
    }
    faults = []
    if missing := sorted(set(wanted) - set(header.tensors)):
        faults.append(f"{len(missing)} missing: {_shortened(missing)}")
    if unexpected := sorted(set(header.tensors) - set(wanted)):
        faults.append(f"{len(unexpected)} unexpected: {_shortened(unexpected)}")
    if "rope_freqs.weight" in unexpected:
        faults.append("rope_freqs.weight scales the rotary frequencies, which is not implemented for GGUF files")
    if faults:
        raise CheckpointMismatchError(
            f"{header.path}: not the tensors of {config.n_layers} layers: {'; '.join(faults)}"
        )
    return {hf: header.tensors[gguf] for gguf, hf in wanted.items()}


def read_llama_tensor(file: BinaryIO, info: TensorInfo, config: LlamaConfig) -> np.ndarray:
    """One tensor as Hugging Face stores it, float32. Raises CheckpointError."""
    values = read_tensor(file, info)
    if info.name.endswith((".attn_q.weight", ".attn_k.weight")):
        return _split_halves(values, info, config)
    return values


def _split_halves(rows: np.ndarray, info: TensorInfo, config: LlamaConfig) -> np.ndarray:
    """Rows of q or k: from rotary pairs that lie side by side, as in GGUF, to the two halves of each head."""
    heads = config.n_heads if ".attn_q." in info.name else config.n_kv_heads
    if rows.shape[0] != heads * config.head_dim:
        raise CheckpointMismatchError(
            f"{info.name} has {rows.shape[0]} rows, which are not {heads} heads of {config.head_dim}"
        )
    pairs = rows.reshape(heads, config.head_dim // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(metadata: "_Metadata", header: GGUFHeader) -> LlamaConfig:
    metadata.check_kind()
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointFormatError(f"{header.path}: it has no token_embd.weight, so it is not a whole model")
    vocab_size = metadata.llama("vocab_size", embedding.shape[0])
    if vocab_size != embedding.shape[0]:
        raise ConfigError(f"llama.vocab_size is {vocab_size}, but token_embd.weight has {embedding.shape[0]} rows")
    sizes = {ours: metadata.llama(key) for key, ours in SIZES.items()}
    config = LlamaConfig(
        **sizes,
        n_kv_heads=metadata.llama("attention.head_count_kv", sizes["n_heads"]),
        head_dim=metadata.llama("attention.key_length", None),
        vocab_size=vocab_size,
        norm_eps=_shortest(metadata.llama("attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(metadata.llama("rope.freq_base", 10_000.0)),
        tie_word_embeddings=HEAD not in header.tensors,
        bos_id=metadata.token_id("bos"),
        eos_ids=tuple(i for i in [metadata.token_id("eos")] if i is not None),
        pad_id=metadata.token_id("padding"),
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.llama(key, config.head_dim) != config.head_dim:
            raise ConfigError(
                f"llama.{key} is {metadata.llama(key)}; only the width of a head, {config.head_dim}, is implemented"
            )
    return config


class _Metadata:
    """The metadata, asked for one key at a time."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self.values = header.metadata

    def check_kind(self) -> None:
        """A whole model of the llama architecture with nothing that is not implemented."""
        for key, only in {"general.architecture": "llama", "general.type": "model", "split.count": 1}.items():
            found = self.values.get(key, None if key == "general.architecture" else only)
            if isinstance(found, np.ndarray) or found != only:
                raise CheckpointFormatError(f"{self.path}: {key} is {shown(found)}; only {only} can be read")
        for key, value in self.values.items():
            name = key.removeprefix("llama.")
            if name == key or name in READ or name in HARMLESS:
                continue
            if name not in ONLY:
                raise ConfigError(f"{shown(key)} is {shown(value)}; this setting is not implemented")
            if isinstance(value, np.ndarray) or value != ONLY[name]:
                raise ConfigError(f"{key} is {shown(value)}; only {ONLY[name]!r} is implemented")

    def llama(self, name: str, *default: Any) -> Any:
        value = self.values.get(f"llama.{name}", *default)
        if value is None and not default:
            raise ConfigError(f"llama.{name} is missing from the metadata")
        if isinstance(value, np.ndarray | list):
            raise ConfigError(f"llama.{name} holds a value for each layer; one for all layers is implemented")
        return value

    def token_id(self, name: str) -> int | None:
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and type(value) is not int:
            raise ConfigError(f"tokenizer.ggml.{name}_token_id must be a whole number, not {shown(value)}")
        return value


def _shortest(value: Any) -> Any:
    """The short decimal that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else value


def _shortened(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more
