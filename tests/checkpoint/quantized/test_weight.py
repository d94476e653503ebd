"""Quantised matrices as a fast model holds them, in parts of fused tensors, in shards and under other names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.checkpoint.io.safetensors_header import read_header
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.quantized.methods import quantized_matrices
from llama_mini.checkpoint.quantized.weight import read_matrix, read_part
from llama_mini.cli.convert import convert
from llama_mini.cli.info import describe
from llama_mini.errors import CheckpointFormatError, CheckpointMismatchError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from tests.checkpoint.quantized.test_mlx import quantized
from tests.checkpoint.quantized.writers import awq, damage, gptq, layers_only, write_model
from tests.optimize.conftest import error
from tests.tiny_families import logits
from tests.tiny_models import random_tokens

TOKENS = random_tokens(1, 9)
INDEX = "model.safetensors.index.json"


def write(directory: Path, method: str, bits: int, model_type: str = "llama", **changes: Any) -> Any:
    rng = np.random.default_rng(bits)
    settings: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": 32}
    if method == "mlx":
        settings = {"bits": bits, "group_size": 32}

    def quantize(name: str, weight: Tensor) -> Any:
        shape = tuple(weight.shape)
        if not layers_only(name, weight):
            return None
        if method == "gptq":
            return gptq(rng, shape, bits, 32, sym=True, v1=True, order=False)
        return awq(rng, shape, 32) if method == "awq" else quantized(weight, bits, 32, "float16")

    key = "quantization" if method == "mlx" else "quantization_config"
    return write_model(directory, {key: settings}, quantize, model_type, **changes)


def test_a_matrix_is_decoded_in_one_thread(tmp_path: Path) -> None:
    """Small operators in several wait for each other where other processes use the cores."""
    write(tmp_path, "gptq", 4)
    config = json.loads((tmp_path / "config.json").read_text())
    matrix, *_ = quantized_matrices(tmp_path, config, read_header(tmp_path / "model.safetensors")).values()
    before, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    chunks = read_matrix(matrix, lambda *_: seen.append(torch.get_num_threads()) or torch.zeros(1), 16)
    between = [torch.get_num_threads() for _ in chunks]
    torch.set_num_threads(before)
    assert set(seen) == {1}
    assert set(between) == {2}
    assert len(seen) == matrix.shape[0] // 16


@pytest.mark.parametrize(
    ("method", "bits", "tolerance"),
    [("gptq", 4, 1e-4), ("gptq", 8, 1e-5), ("awq", 4, 2e-3), ("mlx", 3, 2e-3), ("mlx", 5, 2e-3), ("mlx", 6, 2e-3)],
)
def test_a_fast_model_holds_the_codes(tmp_path: Path, method: str, bits: int, tolerance: float) -> None:
    """Where scales and minima are rounded, to float16, the logits show it."""
    model = write(tmp_path, method, bits)
    fast = load_model(Llama, open_checkpoint(tmp_path), "float32", "cpu", fuser("off"), "auto")
    assert 0 < error(fast(TOKENS), logits(model, TOKENS)) < tolerance


def test_shards_with_an_index(tmp_path: Path) -> None:
    """The parts of a matrix may lie in different files."""
    model = write(tmp_path, "gptq", 4)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
    del weight_map["model.layers.0.mlp.up_proj.qzeros"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with (
        pytest.warns(LlamaMiniWarning, match=r"does not name model\.layers\.0\.mlp\.up_proj\.qzeros: not read"),
        pytest.raises(CheckpointFormatError, match=r"needs model\.layers\.0\.mlp\.up_proj\.qzeros, which no file"),
    ):
        open_checkpoint(tmp_path)


def test_a_prefix_before_every_name(tmp_path: Path) -> None:
    model = write(tmp_path, "awq", 4)
    path = tmp_path / "model.safetensors"
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.warns(LlamaMiniWarning, match=r"begins with 'language_model\.'"):
        mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_a_conversion_writes_floats(tmp_path: Path) -> None:
    model = write(tmp_path / "quantised", "mlx", 4)
    convert(tmp_path / "quantised", tmp_path / "floats", dtype="float32")
    mine = Llama.from_pretrained(tmp_path / "floats")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=3e-5)


def test_info_names_the_method(tmp_path: Path) -> None:
    write(tmp_path, "gptq", 4)
    assert "GPTQ 4 bits, groups of 32, symmetric" in describe(tmp_path)


def test_a_part_that_changed_after_the_header_was_read(tmp_path: Path) -> None:
    write(tmp_path, "gptq", 4)
    path = tmp_path / "model.safetensors"
    tensor = read_header(path)["model.layers.0.mlp.up_proj.qweight"]
    assert torch.equal(read_part(tensor, 2, 3), load_file(path)[tensor.name][2:5])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointFormatError, match="it changed while it was read"):
        read_part(tensor)


def test_scales_whose_products_no_float_can_hold(tmp_path: Path) -> None:
    """As codes they are too large for float16; as floats the weights would be infinite."""
    write(tmp_path, "gptq", 4)
    name = "model.layers.0.mlp.up_proj.scales"
    damage(tmp_path, name, lambda scales: torch.full(scales.shape, 3e38))
    source = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointFormatError, match=rf"tensor '{name}' gives NaN or infinite weights; download"):
        load_model(Llama, source, "float32", "cpu", fuser("off"), "none")
    with pytest.raises(
        CheckpointFormatError, match=r"up_proj.*: a matrix of .* int4 cannot; load it with --quantize none"
    ):
        load_model(Llama, source, "float32", "cpu", fuser("off"), "auto")


def test_biases_stay(tmp_path: Path) -> None:
    model = write(tmp_path, "gptq", 4, "qwen2", attention_bias=None, mlp_bias=None)
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    assert mine.layers[0].attention.q_proj.bias.abs().max() > 0.1
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)


def test_biases_of_zeros_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Old tools of GPTQ wrote one for every matrix."""
    model = write(tmp_path, "gptq", 4)
    path, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.o_proj.bias"
    save_file(load_file(path) | {name: torch.zeros(64)}, path)
    with pytest.warns(LlamaMiniWarning, match=r"o_proj\.bias left out: biases of zeros"):
        mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=2e-5)
    save_file(load_file(path) | {name: torch.ones(64)}, path)
    with pytest.raises(CheckpointMismatchError, match=rf"1 unexpected: {name}"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "mlx"])
@pytest.mark.parametrize("family", ["phi3", "glm4", "cohere2"])
def test_rows_that_are_cut_and_reordered(tmp_path: Path, family: str, method: str) -> None:
    """q, k and v or gate and up in one matrix; rotary pairs side by side."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    sizes |= {"head_dim": 16, "pad_token_id": None}
    model = write(tmp_path, method, 4, family, **sizes)
    mine = Llama.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(mine(TOKENS), logits(model, TOKENS), rtol=0, atol=5e-5)
    fast = load_model(Llama, open_checkpoint(tmp_path), "float32", "cpu", fuser("off"), "auto")
    assert 0 < error(fast(TOKENS), logits(model, TOKENS)) < 2e-3
