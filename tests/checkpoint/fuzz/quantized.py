"""Sound checkpoints of each method of quantisation, for the fuzz test to damage."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.gguf.blocks import CODES
from tests.checkpoint.gguf.gguf_files import write_family
from tests.checkpoint.quantized.libraries import save_bitsandbytes, save_compressed, scheme
from tests.checkpoint.quantized.test_mlx import quantized as mlx
from tests.checkpoint.quantized.writers import Stored, awq, gptq, layers_only, write_model
from tests.tiny_families import random_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
Quantize = Callable[[tuple[int, int], Tensor], tuple[Stored, Any]]
PACKED: dict[str, tuple[str, Mapping[str, Any], Quantize]] = {  # where the settings stand, what they are, the parts
    "gptq": (
        "quantization_config",
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq_v2"},
        lambda shape, _: gptq(_rng(shape), shape, 4, 32, sym=False, v1=False, order=True),
    ),
    "gptq-8": (
        "quantize_config.json",
        {"bits": 8, "group_size": -1, "sym": True, "dynamic": {"-:lm_head": {}}},
        lambda shape, _: gptq(_rng(shape), shape, 8, -1, sym=True, v1=True, order=None),
    ),
    "auto-round": (
        "quantization_config",
        {"quant_method": "auto-round", "bits": 2, "group_size": 32, "extra_config": {"lm_head": {"bits": 16}}},
        lambda shape, _: gptq(_rng(shape), shape, 2, 32, sym=False, v1=True, order=None),
    ),
    "awq": (
        "quantization_config",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        lambda shape, _: awq(_rng(shape), shape, 32),
    ),
    "mlx": (
        "quantization",
        {"group_size": 32, "bits": 5, "mode": "affine", "lm_head": {"group_size": 32, "bits": 6}},
        lambda _, weight: mlx(weight, 5, 32, "float16"),
    ),
    "fp8": (
        "quantization_config",
        {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"},
        lambda shape, weight: _fp8(weight),
    ),
}
GROUPS = {
    "group_0": scheme("Linear", num_bits=4, symmetric=False, strategy="group", group_size=32),
    "group_1": scheme("re:.*down_proj", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "group_2": scheme("re:.*o_proj", num_bits=8, type="float", strategy="channel"),
    "group_3": scheme("re:.*up_proj", "re:.*gate_proj", num_bits=3, strategy="group", group_size=32),
}
SAVED: dict[str, Callable[[Path], Any]] = {  # by the libraries
    "compressed-tensors": lambda folder: save_compressed(folder, GROUPS, **SIZES),
    "nf4": lambda folder: save_bitsandbytes(folder, load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "int8": lambda folder: save_bitsandbytes(folder, load_in_8bit=True),
}
NAMES = (*PACKED, *SAVED)


def write(folder: Path, method: str) -> Path:
    if method in SAVED:
        SAVED[method](folder)
        return folder
    where, settings, quantize = PACKED[method]

    def parts(name: str, weight: Tensor) -> tuple[Stored, Any] | None:
        shape = (weight.shape[0], weight.shape[1])
        return quantize(shape, weight) if layers_only(name, weight) or method == "mlx" else None

    beside = where.endswith(".json")
    write_model(folder, {} if beside else {where: settings}, parts, **SIZES, tie_word_embeddings=method == "mlx")
    if beside:
        (folder / where).write_text(json.dumps(settings))
    return folder


def write_gguf(folder: Path) -> Path:
    """A GGUF file with a matrix of each type that keeps its codes."""
    folder.mkdir()
    layers = [f"blk.{i}.{part}" for i in range(4) for part in ("attn_[qkv].w", "attn_o", "ffn_(gate|up)", "ffn_down")]
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 4}
    model = random_model("qwen3", 5, **sizes, num_attention_heads=4, num_key_value_heads=2)
    return write_family(folder / "tiny.gguf", model, types={**dict(zip(layers, CODES, strict=True)), "": "Q4_K"})


def _rng(shape: tuple[int, int]) -> np.random.Generator:
    return np.random.default_rng(shape)


def _fp8(weight: Tensor) -> tuple[Stored, Any]:
    scales = torch.ones(weight.shape[0] // 16, weight.shape[1] // 16)
    stored = weight.to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scales}, stored.double().numpy()
