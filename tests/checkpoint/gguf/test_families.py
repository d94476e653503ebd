"""GGUF files of every family against the model they were written from; every block type against the gguf library."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from llama_mini.checkpoint.gguf.header import GGUFTensor
from llama_mini.checkpoint.gguf.model import open_gguf
from llama_mini.checkpoint.gguf.tensors import read_tensor
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.checkpoint.source import QuantizedWeights, Source
from llama_mini.errors import CheckpointMismatchError
from llama_mini.model.llama import Llama
from tests.checkpoint.gguf.gguf_files import write_family
from tests.tiny_families import logits, random_model, random_settings
from tests.tiny_models import random_tokens

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "olmo2"]
ROPE = {"default": 0, "linear": 1, "yarn": 4}  # kind -> a seed whose random settings have it


def without_window(seed: int, model_type: str) -> int:
    """The next seed of the same rope type whose settings have no window, which a GGUF file of these does not state."""
    settings = random_settings(model_type, seed)
    windowed = settings.get("use_sliding_window") or (model_type == "mistral" and settings["sliding_window"])
    return without_window(seed + 7, model_type) if windowed else seed


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", ROPE)
def test_logits_are_those_of_the_model_it_was_written_from(tmp_path: Path, model_type: str, kind: str) -> None:
    theirs = random_model(model_type, without_window(ROPE[kind], model_type))
    rope = theirs.config.rope_parameters
    assert rope["rope_type"] == kind
    scaling: dict[str, Any] = {}
    if kind != "default":
        scaling = {"rope__scaling__type": kind, "rope__scaling__factor": float(rope["factor"])}
    if kind == "yarn":
        scaling["rope__scaling__original_context_length"] = rope["original_max_position_embeddings"]
    path = write_family(tmp_path / "model", theirs, **scaling)  # no .gguf: the name does not matter
    tokens = random_tokens(1, 80)
    torch.testing.assert_close(Llama.from_pretrained(path)(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)


def codes(source: Source, name: str) -> QuantizedWeights:
    [(_, _, stored)] = source.read_quantized([to_file_name(name, source.keys)])
    return stored.unpacked()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_q_k_and_v_in_one_tensor(tmp_path: Path, model_type: str, kind: Kind) -> None:
    """Rotary pairs side by side and quantised; split halves and biases."""
    theirs = random_model(model_type, 0, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    paths = [write_family(tmp_path / str(fused), theirs, kind, fuse_qkv=fused) for fused in (False, True)]
    plain, fused = (Llama.from_pretrained(path).state_dict() for path in paths)
    assert plain.keys() == fused.keys()
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    for name in [f"layers.{i}.attention.{part}_proj.weight" for i in range(3) for part in "qkv"]:
        if kind is Kind.Q4_0:
            stored, joined = (codes(open_gguf(path), name) for path in paths)
            assert all(torch.equal(a, b) for a, b in zip(stored, joined, strict=True))


def test_a_joined_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    theirs = random_model("llama", 0, num_attention_heads=4, num_key_value_heads=2)
    path = write_family(tmp_path / "model", theirs, fuse_qkv=True, attention__head_count_kv=4)
    with pytest.raises(CheckpointMismatchError, match=r"model: blk\.0\.attn_qkv\.weight has .* rows, but"):
        open_gguf(path)


def block_types() -> list[str]:
    return sorted(kind.name for kind in quants._type_traits)


@pytest.mark.parametrize("name", block_types())
def test_every_block_type_is_what_the_gguf_library_makes_of_it(tmp_path: Path, name: str) -> None:
    """Random blocks, so large that they are read in parts, against the library's own arithmetic on the whole."""
    kind = Kind[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, per_row = 70, 65_536 // block
    data = np.random.default_rng(0).integers(0, 256, (rows, per_row * size), dtype=np.uint8)
    path = tmp_path / "blocks"
    path.write_bytes(b"\0" * 32 + data.tobytes())
    info = GGUFTensor("t", (7, 10, per_row * block), name, 32, data.size)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, kind).reshape(info.shape)
        for dtype in (torch.float32, torch.bfloat16):
            with path.open("rb") as file:
                found = read_tensor(file, info, dtype)
            assert torch.equal(found.isnan(), torch.from_numpy(np.isnan(expected)))
            assert torch.equal(found.nan_to_num(), torch.from_numpy(expected).to(dtype).nan_to_num())


@pytest.mark.parametrize(
    ("kind", "tolerance"), [(Kind.F16, 2e-3), (Kind.BF16, 2e-2), (Kind.Q8_0, 2e-2), (Kind.Q5_1, 0.2)]
)
def test_a_quantised_model_is_near_the_one_it_was_made_from(tmp_path: Path, kind: Kind, tolerance: float) -> None:
    """Matrices of 64 columns, so that blocks of 32 fit: the relative error of the logits is the number format's."""
    theirs = random_model(
        "llama", 0, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
    )
    path = write_family(tmp_path / "model", theirs, kind)
    tokens = random_tokens(1, 40)
    expected, found = logits(theirs, tokens), Llama.from_pretrained(path, dtype="float32")(tokens)
    error = ((found - expected).norm() / expected.norm()).item()
    assert tolerance / 50 < error < tolerance
    assert open_gguf(path).dtype == {Kind.F16: torch.float16}.get(kind, torch.bfloat16)
