"""GGUF files of every family against the model they were written from; every block type against the gguf library."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_mini.checkpoint.gguf.header import GGUFTensor
from llama_mini.checkpoint.gguf.model import open_gguf
from llama_mini.checkpoint.gguf.tensors import read_tensor
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.checkpoint.source import QuantizedWeights, Source
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointMismatchError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from llama_mini.tokenizer.tokenizer_json import BYTE_LETTERS
from tests.checkpoint.gguf.gguf_files import FORMATS, write_family
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

ROPE = {"default": 0, "linear": 1, "yarn": 4}  # kind -> a seed whose random settings have it
# Settings that their random choices may have, and GGUF files of these architectures cannot state.
STATED: dict[str, dict[str, Any]] = {
    **{name: {"sliding_window": None} for name in ("mistral", "ministral3")},
    **{name: {"use_sliding_window": False, "layer_types": None} for name in ("qwen2", "qwen3")},
    "smollm3": {"use_sliding_window": False, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "arcee": {"hidden_act": "relu2"},
    "starcoder2": {"sliding_window": None},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"},
}
STATED["gemma3_text"] = STATED["gemma2"]
STATED["gemma2"] = STATED["gemma2"] | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}
for always_tied in ("gemma", "gemma2", "cohere", "cohere2"):
    STATED.setdefault(always_tied, {})["tie_word_embeddings"] = True


TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"]}
TOKENIZER |= {"tokenizer.ggml.tokens": [*BYTE_LETTERS, "ab"]}


def stated_model(model_type: str, kind: str, **changes: Any) -> PreTrainedModel:
    model = random_model(model_type, ROPE[kind], **STATED.get(model_type, {}) | changes)
    ropes = model.config.rope_parameters
    assert ropes.get("full_attention", ropes)["rope_type"] == kind or model_type in (
        "phi3",
        "ministral3",
    )  # which have their own
    return model


def families(*quick: str) -> list[Any]:
    """Every family; those that are not `quick` are marked slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in FORMATS]


@pytest.mark.parametrize("model_type", families(*FORMATS))
def test_logits_are_those_of_the_model_it_was_written_from(tmp_path: Path, model_type: str) -> None:
    check_logits(tmp_path, stated_model(model_type, "yarn"))


@pytest.mark.parametrize("model_type", families("llama", "mistral", "qwen2", "qwen3", "olmo2", "glm4"))
@pytest.mark.parametrize("kind", ["default", "linear"])
def test_logits_with_other_rotary_scaling(tmp_path: Path, model_type: str, kind: str) -> None:
    check_logits(tmp_path, stated_model(model_type, kind))


def check_logits(folder: Path, theirs: PreTrainedModel) -> None:
    path = write_family(folder / "model", theirs)  # no .gguf: the name does not matter
    tokens = random_tokens(1, 80)
    torch.testing.assert_close(Llama.from_pretrained(path)(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", families("gemma3_text", "phi3", "cohere2"))
def test_transformers_opens_what_it_is_converted_to(tmp_path: Path, model_type: str) -> None:
    theirs = stated_model(model_type, "yarn", vocab_size=260)
    convert(write_family(tmp_path / "model", theirs, **TOKENIZER), tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert type(again) is type(theirs) or model_type == "mistral"  # of which no GGUF file tells
    tokens = random_tokens(1, 80)
    torch.testing.assert_close(logits(again, tokens), logits(theirs, tokens), rtol=0, atol=2e-5)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=1e-6)  # 1 + w - 1 is rounded


def test_phi_3_with_lists_of_factors(tmp_path: Path) -> None:
    """Beyond the original context, with three quarters of a head rotated."""
    factors = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "type": "longrope"} | factors
    rope["original_max_position_embeddings"] = 40
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160}
    original = {"original_max_position_embeddings": 40}
    check_logits(tmp_path, random_model("phi3", 0, rope_parameters=rope, **sizes, **original))


def test_glm_4v_has_its_pairs_split(tmp_path: Path) -> None:
    """With sections for images, the converter splits the pairs; of texts, sections change nothing."""
    theirs = random_model("glm4", 0)
    tokens, turned = random_tokens(1, 40), int(16 * theirs.config.rope_parameters["partial_rotary_factor"])
    expected = logits(theirs, tokens)
    for name, parameter in theirs.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            heads = parameter.data.unflatten(0, (-1, 16))
            parts = (heads[:, 0:turned:2], heads[:, 1:turned:2], heads[:, turned:])
            parameter.data.copy_(torch.cat(parts, dim=1).flatten(0, 1))
    path = write_family(tmp_path / "model", theirs, rope__dimension_sections=[2, 1, 1, 0])
    with pytest.warns(LlamaMiniWarning, match=r"rope\.dimension_sections ignored"):
        found = Llama.from_pretrained(path)(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


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
            assert stored.min is joined.min is None
            assert all(torch.equal(a, b) for a, b in zip(stored[:2], joined[:2], strict=True))


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
    rows, per_row = 70, 8192 // block  # 32 rows at once
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
