"""Quantised files as models: which format holds each matrix, how near it is, and how many bytes that takes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_mini import LLM, Llama, Tokenizer
from llama_mini.checkpoint.gguf.blocks import CODES
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.weight_formats import weight_bytes, weight_formats
from llama_mini.errors import CheckpointFormatError, RequestError
from llama_mini.optimize import fuser
from llama_mini.optimize.fused_layers import FusedEmbedding
from llama_mini.optimize.packed_linear import PackedLinear
from tests.checkpoint.gguf import gguf_files
from tests.optimize.conftest import KERNELS, error
from tests.optimize.test_loading import TEXT, floats_of, parts
from tests.test_memory import peak
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens

FLOATS = {"F32", "F16", "BF16"}
Q4_K_M = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "^output": "Q6_K"}  # all others: Q4_K


def written(path: Path, kinds: Mapping[str, str], usual: str, family: str, **more: int) -> Path:
    """A tiny model of random blocks, of the type in `kinds` for a pattern of the tensor's name."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = random_model(family, 0, head_dim=64, tie_word_embeddings=False, vocab_size=96, **sizes, **more)

    return gguf_files.write_family(path, theirs, types={**kinds, "": usual})


def kept(path: Path, kernels: str = "auto") -> Llama:
    return load_model(Llama, open_checkpoint(path), "float32", "cpu", fuser(kernels), "auto")


def matrices(model: Llama) -> dict[str, tuple[PackedLinear, int]]:
    assert isinstance(model.tok_embeddings, FusedEmbedding)
    others = {"tok_embeddings": (model.tok_embeddings.head.linear, 0), "lm_head": (model.lm_head.linear, 0)}
    return parts(model) | others


def half_a_step(values: Tensor) -> Tensor:
    """The most by which int8 rounds each value: half a step, and 127 times the rounding of the scale to float16."""
    largest = values.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    return largest * (0.5 / 127 + 2**-11) + 127 * 2**-25


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_every_type_runs_in_a_format_that_loses_none_of_its_bits(tmp_path: Path, family: str) -> None:
    """All of them in one file: each fused matrix has another type. LLaMA's q and k have rotary pairs side by side."""
    fused = [f"blk.{i}.{part}" for i in range(6) for part in ("attn_[qkv].w", "attn_o", "ffn_(gate|up)", "ffn_down")]
    types = sorted({kind.name for kind in quants._type_traits} - FLOATS)
    kinds = dict(zip(fused, types, strict=False))
    assert len(kinds) == len(types)
    kinds |= {"blk.6.attn_[qkv].w": "Q4_K", "blk.7.attn_[qkv].w": "Q6_K"}
    path = written(tmp_path / "model", kinds, "Q8_0", family, num_hidden_layers=8)
    source, model = open_checkpoint(path), kept(path)
    weights = dict(Llama.from_pretrained(path, dtype="float32").named_parameters())
    for name, (matrix, part) in matrices(model).items():
        kind = source.tensors[to_file_name(f"{name}.weight", source.keys)].number_format
        assert matrix.name == CODES.get(kind, ("int8",))[0], kind
        expected = weights[f"{name}.weight"]
        bound = expected.abs().amax() * 2**-10 if kind in CODES else half_a_step(expected)
        assert ((floats_of(matrix, part) - expected).abs() <= bound).all(), kind


@pytest.mark.parametrize(("family", "kernels"), [("llama", "auto"), ("qwen3", "off")])
def test_a_file_that_mixes_types_keeps_them(tmp_path: Path, family: str, kernels: str) -> None:
    """As llama.cpp mixes them: v has more bits than q and k. A matrix of floats makes all of its kind floats."""
    path = written(tmp_path / "model", Q4_K_M | {"1.ffn_up": "F32", "1.attn_k": "Q5_K"}, "Q4_K", family)
    source = open_checkpoint(path)
    formats, model = weight_formats(source, "auto"), kept(path, kernels)
    found = {name: matrix.name for name, (matrix, _) in matrices(model).items()}
    expected = {name: formats.get(f"{name}.weight", "float") for name in found}
    assert found == expected
    for layer in ("layers.0.", "layers.1."):
        for name, kind in {"q": "q4_k", "k": "q5_k" if layer == "layers.1." else "q4_k", "v": "q6_k"}.items():
            assert found[f"{layer}attention.{name}_proj"] == kind
        assert found[f"{layer}attention.o_proj"] == "q4_k"
        assert found[f"{layer}feed_forward.down_proj"] == "q6_k"
    assert [found[f"layers.{i}.feed_forward.gate_proj"] for i in range(2)] == ["q4_k", "float"]
    assert (found["tok_embeddings"], found["lm_head"]) == ("q4_k", "q6_k")
    tokens = random_tokens(1, 20, vocab_size=96)
    plain = Llama.from_pretrained(path, dtype="float32")
    assert error(model(tokens), plain(tokens)) < 0.1
    for name, (matrix, part) in matrices(model).items():  # the same weights: what is left is the arithmetic
        plain.get_parameter(f"{name}.weight").copy_(floats_of(matrix, part))
    assert error(model(tokens), plain(tokens)) < 1e-3
    held = sum(p.nbytes for p in model.parameters())
    held += sum(matrix.n_bytes for matrix in {matrix for matrix, _ in matrices(model).values()})
    assert weight_bytes(source, torch.float32, "auto") == held


def test_what_is_asked_for_wins_over_the_files_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "model", {}, "Q4_K", "qwen3")
    source = open_checkpoint(path)
    monkeypatch.setattr("llama_mini.engine.llm.open_tokenizer", lambda _: type("None", (), {"eos_ids": frozenset()})())

    def formats(**settings: str | None) -> set[str]:
        llm = LLM(source, threads=1, **settings)
        return {module.name for module in llm.model.modules() if isinstance(module, PackedLinear)}

    assert formats() == formats(quantize=None) == formats(quantize="auto") == {"q4_k"}
    assert formats(quantize="none") == formats(dtype="float32") == formats(dtype="bfloat16") == {"float"}
    assert formats(quantize="int8") == {"int8"}
    assert formats(quantize="int4", dtype="float32") == {"int4", "int8"}
    assert not any(isinstance(m, PackedLinear) for m in Llama.from_pretrained(path).modules())
    with pytest.raises(RequestError, match=r"^unknown quantize 'int5'; known: auto, none, int8, int4$"):
        LLM(path, quantize="int5")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("gate", "up", "held"), [("Q4_K", "Q4_1", "int4"), ("Q5_K", "Q4_K", "q5_k"), ("IQ4_XS", "IQ4_NL", "iq4")]
)
def test_k_quants_joined_with_others_are_their_numbers(
    tmp_path: Path, gate: str, up: str, held: str, kernels: str
) -> None:
    path = written(tmp_path / "model", {"ffn_gate": gate, "ffn_up": up}, "Q8_0", "qwen3")
    weights = dict(Llama.from_pretrained(path, dtype="float32").named_parameters())
    for name, (matrix, part) in matrices(kept(path, kernels)).items():
        if "gate" in name or "up_" in name:
            assert matrix.name == held
            expected = weights[f"{name}.weight"]
            assert ((floats_of(matrix, part) - expected).abs() <= expected.abs().amax() * 2**-10).all()


def test_a_product_of_scales_that_float16_cannot_hold(tmp_path: Path) -> None:
    """Is held as it is in the file, and refused where scales must be float16."""
    path = written(tmp_path / "model", {"ffn_up": "Q4_1"}, "Q4_K", "qwen3")
    source = open_checkpoint(path)
    for name, refused in (("ffn_down", False), ("ffn_gate", True)):
        data = bytearray(path.read_bytes())
        at = source.gguf.tensors[f"blk.1.{name}.weight"].offset
        data[at : at + 2] = np.float16(6e4).tobytes()
        data[at + 4] = 63
        changed = tmp_path / name
        changed.write_bytes(data)
        if refused:
            with pytest.raises(CheckpointFormatError, match="holds numbers that int4 cannot"):
                kept(changed)
        else:
            found = matrices(kept(changed))["layers.1.feed_forward.down_proj"]
            assert floats_of(*found).abs().amax() > 2**16


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "MXFP4", "Q6_K"])
def test_a_scale_that_no_format_holds_is_one_sentence(tmp_path: Path, kind: str, kernels: str) -> None:
    path = written(tmp_path / "model", {}, kind, "qwen3")
    tensor = open_checkpoint(path).gguf.tensors["blk.1.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    at = tensor.offset + {"Q6_K": 208}.get(kind, 0)
    data[at : at + 2] = b"\x50" * 2 if kind == "MXFP4" else np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(
        CheckpointFormatError,
        match=rf"layers.1.feed_forward.down_proj.*holds numbers that {CODES[kind][0]} cannot; .*--quantize none$",
    ):
        kept(path, kernels)
    load_model(Llama, open_checkpoint(path), "float32", "cpu", fuser(kernels), "none")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q5_0, Kind.Q5_1, Kind.MXFP4], ids=lambda kind: kind.name)
def test_the_default_checkpoint_loses_nothing_at_its_own_bits(tmp_path: Path, smollm2_dir: Path, kind: Kind) -> None:
    """Quantised by gguf itself; codes and operators against the same weights as floats, over 1,024 tokens."""
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    path = gguf_files.write_family(tmp_path / "model", theirs, kind)
    tokens = torch.tensor([Tokenizer.from_pretrained(smollm2_dir).encode(TEXT.read_text(encoding="utf-8"))[:1024]])

    def nats(model: Llama) -> float:
        return float(torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]))

    assert abs(nats(kept(path)) - nats(Llama.from_pretrained(path, dtype="float32"))) < 0.005


def test_loading_codes_takes_a_few_megabytes_beside_them(smollm2_gguf: Path) -> None:
    source = open_checkpoint(smollm2_gguf)
    codes = weight_bytes(source, torch.bfloat16, "auto")
    fuse = fuser("auto")
    most = peak(lambda: load_model(Llama, source, torch.bfloat16, "cpu", fuse, "auto"))
    assert codes <= most < codes + 10 * 2**20
