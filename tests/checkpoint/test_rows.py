"""Rows of a file's tensors: parameters that share a tensor, and rotary pairs side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.rows import reorder_pairs
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointMismatchError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.optimize import fuser
from llama_mini.optimize.packed_linear import PackedLinear
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

QKV = "model.layers.0.self_attn.qkv_proj.weight"


def phi3(directory: Path, **changes: Any) -> dict[str, Tensor]:
    random_model("phi3", 0, **changes).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(("heads", "width", "rotary"), [(1, 2, 2), (3, 8, 8), (2, 12, 4), (4, 6, 2)])
@pytest.mark.parametrize("columns", [(), (5,)], ids=["bias", "weight"])
def test_pairs_are_split_and_joined(heads: int, width: int, rotary: int, columns: tuple[int, ...]) -> None:
    config = LlamaConfig(
        dim=8, n_layers=1, n_heads=heads, head_dim=width, rotary_dim=rotary, hidden_dim=4, vocab_size=9
    )
    rows = torch.arange(heads * width).view(-1, *[1] * len(columns)).expand(-1, *columns)
    ours = reorder_pairs(rows, config, to_file=False)
    expected = np.arange(heads * width).reshape(heads, width)
    turned = expected[:, :rotary]
    expected = np.concatenate((turned[:, ::2], turned[:, 1::2], expected[:, rotary:]), axis=1)
    assert np.array_equal(ours.reshape(heads * width, -1)[:, 0].numpy(), expected.reshape(-1))
    assert torch.equal(reorder_pairs(ours, config, to_file=True), rows)


def test_parts_are_the_rows_of_their_tensor(tmp_path: Path) -> None:
    tensors = phi3(tmp_path, num_key_value_heads=2)
    model = Llama.from_pretrained(tmp_path)
    attention = model.layers[0].attention  # type: ignore[union-attr]
    parts = [projection.weight for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({part.shape for part in parts}) == 2
    assert torch.equal(torch.cat(parts), tensors[QKV])


@pytest.mark.parametrize("name", [QKV, "model.layers.1.mlp.gate_up_proj.weight"])
def test_parts_that_do_not_add_up_are_an_error_that_names_the_tensor(tmp_path: Path, name: str) -> None:
    tensors = phi3(tmp_path)
    save_file(tensors | {name: tensors[name][:-2].contiguous()}, tmp_path / "model.safetensors")
    n = len(tensors[name])
    with pytest.raises(
        CheckpointMismatchError, match=rf"{name} has {n - 2} rows, but the configuration asks for \d+ of"
    ):
        Llama.from_pretrained(tmp_path)


def test_a_tensor_of_several_parameters_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors = phi3(tmp_path)
    del tensors[QKV]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"3 missing: model\.layers\.0\.self_attn\.qkv_proj\.weight\[k\]"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
@pytest.mark.parametrize("model_type", ["phi3", "glm4"])
def test_shards_with_an_index_and_pickles(tmp_path: Path, model_type: str) -> None:
    theirs = random_model(model_type, 1)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tokens = random_tokens(1, 40)
    expected = logits(theirs, tokens)
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "shards")(tokens), expected, rtol=0, atol=2e-5)

    theirs.config.save_pretrained(tmp_path / "pickle")
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    convert(tmp_path / "pickle", tmp_path / "converted")
    torch.testing.assert_close(Llama.from_pretrained(tmp_path / "converted")(tokens), expected, rtol=0, atol=2e-5)
    files = (next((tmp_path / name).glob("*.safetensors")) for name in ("shards", "converted"))
    original, saved = (set(load_file(file)) for file in files)
    assert original <= saved


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize(("model_type", "twin"), [("phi3", "llama"), ("glm4", "hyperclovax")])
def test_quantised_while_loading_they_are_those_of_a_plain_file(
    tmp_path: Path, model_type: str, twin: str, quantize: str
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    sizes: dict[str, Any] = {"intermediate_size": 96, "rope_parameters": rope}
    sizes |= {"sliding_window": None} if twin == "llama" else {"attention_bias": False}
    random_model(model_type, 1, **sizes).save_pretrained(tmp_path / "theirs")
    Llama.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "twin")
    assert json.loads((tmp_path / "twin" / "config.json").read_text())["model_type"] == twin
    sources = [open_checkpoint(tmp_path / name) for name in ("theirs", "twin")]
    ours, plain = (load_model(Llama, source, "float32", "cpu", fuser("off"), quantize) for source in sources)
    assert any(isinstance(module, PackedLinear) for module in ours.modules())
    tokens = random_tokens(1, 20)
    assert torch.equal(ours(tokens), plain(tokens))


def test_an_unexpected_bias_that_is_of_no_whole_heads_is_named(tmp_path: Path) -> None:
    random_model("ernie4_5", 0, use_bias=False).save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.ones(9)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatchError, match=f"1 unexpected: {name}"):
        Llama.from_pretrained(tmp_path)
