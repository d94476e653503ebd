"""GGUF files of random weights, in the kinds that llama.cpp's own files mix: for models that nobody has here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

EIGHT_BILLION = {  # LLaMA-3.1-8B, in the names of `LlamaConfig`
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "hidden_dim": 14336,
    "vocab_size": 128256,
    "max_seq_len": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_STD = {"Q4_0": 0.002, "Q4_K": 0.0001, "Q6_K": 0.00002}  # scales for weights of some 0.01, whatever the other bytes are
_SCALES_AT = {"Q4_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # bytes of a block where they are, float16


def write_random_gguf(path: Path, kind: str, shape: Mapping[str, Any], seed: int = 0) -> None:
    """Writes a model of this shape without a vocabulary. kind: Q4_0 or Q4_K_M."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(shape["max_seq_len"])
    writer.add_embedding_length(shape["dim"])
    writer.add_block_count(shape["n_layers"])
    writer.add_feed_forward_length(shape["hidden_dim"])
    writer.add_head_count(shape["n_heads"])
    writer.add_head_count_kv(shape["n_kv_heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    tensors = _tensors(kind, shape)
    for name, (rows, columns, of_kind) in tensors.items():
        numbers, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[of_kind]]
        size = columns // numbers * n_bytes
        dtype = np.dtype(np.float32 if of_kind == "F32" else np.uint8)
        stored = (columns,) if of_kind == "F32" else (rows, size)
        writer.add_tensor_info(name, stored, dtype, rows * size, GGMLQuantizationType[of_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(seed)
    for rows, columns, of_kind in tensors.values():
        writer.write_tensor_data(_random(of_kind, rows, columns, generator))
    writer.close()


def _tensors(kind: str, shape: Mapping[str, Any]) -> dict[str, tuple[int, int, str]]:
    """(rows, columns, kind) of each tensor, by its name in the file."""
    dim, hidden, n = shape["dim"], shape["hidden_dim"], shape["n_layers"]
    kv = dim // shape["n_heads"] * shape["n_kv_heads"]
    tied, mixed = shape["tie_word_embeddings"], kind == "Q4_K_M"
    most = "Q4_K" if mixed else kind
    tensors = {"token_embd.weight": (shape["vocab_size"], dim, "Q6_K" if tied else most)}
    if not tied:
        tensors["output.weight"] = (shape["vocab_size"], dim, "Q6_K")
    tensors["output_norm.weight"] = (1, dim, "F32")
    for i in range(n):
        # llama.cpp's rule: 6 bits in the first and last eighth of the layers, and in every third between them
        more = "Q6_K" if mixed and (i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2) else most
        tensors |= {
            f"blk.{i}.attn_norm.weight": (1, dim, "F32"),
            f"blk.{i}.attn_q.weight": (dim, dim, most),
            f"blk.{i}.attn_k.weight": (kv, dim, most),
            f"blk.{i}.attn_v.weight": (kv, dim, more),
            f"blk.{i}.attn_output.weight": (dim, dim, most),
            f"blk.{i}.ffn_norm.weight": (1, dim, "F32"),
            f"blk.{i}.ffn_gate.weight": (hidden, dim, most),
            f"blk.{i}.ffn_up.weight": (hidden, dim, most),
            f"blk.{i}.ffn_down.weight": (dim, hidden, more),
        }
    return tensors


def _random(kind: str, rows: int, columns: int, generator: np.random.Generator) -> NDArray[Any]:
    if kind == "F32":
        return generator.uniform(0.5, 1.5, columns).astype(np.float32)
    numbers, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = np.frombuffer(generator.bytes(rows * columns // numbers * n_bytes), np.uint8).reshape(-1, n_bytes).copy()
    for at in _SCALES_AT[kind]:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(_STD[kind]).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)
