"""How much memory a quantised file takes: its matrices little more than their bytes, and loading a few MB beside."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from safetensors.torch import save_file
from torch import Tensor

from llama_mini.checkpoint.code_formats import code_format
from llama_mini.checkpoint.gguf.blocks import CODES
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.weight_formats import weight_bytes, weight_formats
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from tests.checkpoint.gguf.gguf_files import write_family
from tests.checkpoint.quantized.writers import edit_config
from tests.test_memory import peak
from tests.tiny_families import random_model

SIZES: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 512}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
U8, I32 = torch.uint8, torch.int32
Parts = dict[str, Tensor]


def gptq(bits: int, rows: int, columns: int) -> Parts:
    """In groups of 128, with the columns in another order. Eight bits are symmetric: their zero points are 127 + 1."""
    return {
        "qweight": torch.zeros(columns * bits // 32, rows, dtype=I32),
        "qzeros": torch.full((columns // 128, rows * bits // 32), 0x7F7F7F7F, dtype=I32),
        "scales": torch.ones(columns // 128, rows).half(),
        "g_idx": (torch.arange(columns) // 128).roll(64).int(),
    }


def mlx(bits: int, rows: int, columns: int) -> Parts:
    scales = torch.ones(rows, columns // 64).half()
    return {"weight": torch.zeros(rows, columns * bits // 32, dtype=torch.uint32), "scales": scales, "biases": -scales}


def nf4(rows: int, columns: int) -> Parts:
    """With nested statistics, as most files have them."""
    n, state = rows * columns // 64, {"quant_type": "nf4", "blocksize": 64, "shape": [rows, columns]}
    state |= {"nested_blocksize": 256, "nested_offset": 0.1}
    return {
        "weight": torch.zeros(rows * columns // 2, 1, dtype=U8),
        "weight.absmax": torch.zeros(n, dtype=U8),
        "weight.nested_absmax": torch.ones(n // 256),
        "weight.nested_quant_map": torch.ones(256),
        "weight.quant_map": get_4bit_type("nf4", device="cpu"),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=U8),
    }


def nvfp4(rows: int, columns: int) -> Parts:
    scales = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
    return {
        "weight": torch.zeros(rows, columns // 2, dtype=U8),
        "weight_scale": scales,
        "weight_scale_2": torch.ones(()),
    }


METHODS: dict[str, tuple[dict[str, Any], Callable[[int, int], Parts]]] = {
    **{
        f"GPTQ {bits}": ({"quant_method": "gptq", "bits": bits, "desc_act": True}, partial(gptq, bits))
        for bits in (2, 3, 4, 8)
    },
    **{f"MLX {bits}": ({"quant_method": "mlx", "bits": bits}, partial(mlx, bits)) for bits in (2, 3, 4, 6)},
    "NF4": ({"quant_method": "bitsandbytes"}, nf4),
    "ModelOpt NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
}
# How much larger a matrix is in memory, by the first word of its name. GGUF's scales and GPTQ's zero points have fewer
# bits in the file.
GROWING = {"MLX": 1.0, "GPTQ": 1.06, "TQ1_0": 1.26}
GROWING |= {"Q2_K": 1.2, "Q3_K": 1.04, "Q4_K": 1.03, "Q5_K": 1.03, "Q6_K": 1.0, "IQ4_XS": 1.02}


def write(path: Path, name: str, **sizes: int) -> Path:
    """A model whose matrices are of a GGUF type, or as one of METHODS stores them; the embedding of these is plain."""
    model, tensors = random_model("qwen3", 0, **SIZES | sizes), dict[str, Tensor]()
    if name in CODES:
        return write_family(path / "model.gguf", model, types={"": name})
    settings, parts_of = METHODS[name]
    for key, weight in model.state_dict().items():
        if weight.ndim == 2 and "layers" in key:
            made = parts_of(*weight.shape)
            tensors |= {key.removesuffix("weight") + end: part.contiguous() for end, part in made.items()}
        elif key != "lm_head.weight":
            tensors[key] = weight.half()
    model.config.save_pretrained(path)
    edit_config(path, {"quantization_config": settings})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.filterwarnings("ignore:ModelOpt also")
@pytest.mark.parametrize("name", [*CODES, *METHODS])
def test_matrices_take_little_more_than_in_the_file(tmp_path: Path, name: str) -> None:
    source = open_checkpoint(write(tmp_path, name, hidden_size=256, intermediate_size=512, num_hidden_layers=1))
    formats = weight_formats(source, "auto")
    for ours in ("attention.o_proj", "feed_forward.down_proj"):
        stored = source.tensors[to_file_name(f"layers.0.{ours}.weight", source.keys)]
        assert stored.has_codes
        assert formats[f"layers.0.{ours}.weight"] == stored.kept
        held = code_format(stored.kept).n_bytes(*stored.shape)
        assert held <= GROWING.get(name.split()[0], 1.12) * stored.n_bytes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ModelOpt also")
@pytest.mark.parametrize(
    "name", ["Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "NVFP4", "GPTQ 2", "GPTQ 4", "GPTQ 8", "MLX 2", "MLX 6", "NF4"]
)
def test_loading_takes_a_few_megabytes_beside_them(tmp_path: Path, name: str) -> None:
    source, fuse = open_checkpoint(write(tmp_path, name)), fuser("auto")
    codes = weight_bytes(source, torch.bfloat16, "auto")
    most = peak(lambda: load_model(Llama, source, torch.bfloat16, "cpu", fuse, "auto"))
    assert codes <= most < codes + 10 * 2**20
