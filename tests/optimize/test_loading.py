"""Loading into formats: what is read, what stays bit for bit, what it takes in memory, and what it costs in nats."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from torch import Tensor

from llama_mini import LLM, Llama, Tokenizer
from llama_mini.checkpoint.gguf.header import read_header
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.checkpoint.weight_formats import weight_bytes
from llama_mini.errors import CapacityError, CheckpointFormatError, RequestError
from llama_mini.memory import check_fits
from llama_mini.model.norm import RMSNorm
from llama_mini.optimize import fuser
from llama_mini.optimize.fused_branches import FusedAttention, FusedFeedForward
from llama_mini.optimize.packed_linear import PackedLinear
from llama_mini.optimize.quantized_linear import QuantizedLinear
from tests.checkpoint.gguf.gguf_files import interleaved, write_family
from tests.optimize.conftest import FORMATS, KERNELS, error, fast_of
from tests.test_memory import peak
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens, randomise, tiny_model

TEXT = Path(sys.modules["llama_mini"].__file__ or "").parent / "lab" / "text.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
}


def loaded(path: Path, quantize: str | None, kernels: str = "auto", dtype: str = "float32") -> Llama:
    return load_model(Llama, open_checkpoint(path), dtype, "cpu", fuser(kernels), quantize or "none")


def parts(model: Llama) -> dict[str, tuple[PackedLinear, int]]:
    """Of each projection of the plain model, the matrix that holds it and which part of it."""
    found: dict[str, tuple[PackedLinear, int]] = {}
    for i, layer in enumerate(model.layers):
        attention, feed_forward = layer.attention, layer.feed_forward
        assert isinstance(attention, FusedAttention)
        assert isinstance(feed_forward, FusedFeedForward)
        matrices = {
            "attention.q_proj attention.k_proj attention.v_proj": attention.qkv_proj,
            "attention.o_proj": attention.o_proj,
            "feed_forward.gate_proj feed_forward.up_proj": feed_forward.gate_up_proj,
            "feed_forward.down_proj": feed_forward.down_proj,
        }
        for names, matrix in matrices.items():
            held = [(each, part) for each in matrix.matrices for part in range(len(each.parts))]
            found |= zip([f"layers.{i}.{name}" for name in names.split()], held, strict=True)
    return found


def floats_of(matrix: PackedLinear, part: int) -> Tensor:
    begin = matrix.offsets[part]
    return matrix.lookup(torch.arange(begin, begin + matrix.parts[part]))


def quantized_of(matrix: QuantizedLinear, part: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (rows, columns), scales and mins (rows, columns / 32), from blocks of sixteen rows."""
    begin, rows, steps = matrix.offsets[part], matrix.parts[part], matrix.n_groups
    quads = torch.stack((matrix.qweight & 15, matrix.qweight >> 4), 3)  # (blocks, steps, 4, 2, 16, 4)
    codes = quads.permute(0, 4, 1, 2, 3, 5).reshape(-1, 32 * steps)
    scales = [t.transpose(1, 2).reshape(-1, steps)[begin : begin + rows] for t in (matrix.scales, matrix.mins)]
    return codes[begin : begin + rows, : matrix.columns], *scales


def stored_codes(blocks: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of a file's blocks, (rows, columns / 32, 18 or 20) bytes, by the layout that llama.cpp describes."""
    head = 2 if kind == Kind.Q4_0 else 4
    packed = blocks[..., head:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(len(blocks), -1)
    scales = np.ascontiguousarray(blocks[..., :head]).view(np.float16)
    least = scales[..., 1] if kind == Kind.Q4_1 else (-8 * scales[..., 0].astype("f4")).astype("f2")
    return codes, scales[..., 0], least


# --- checkpoints as they are ---


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_loaded_is_what_is_made_of_a_loaded_model(
    tmp_path: Path, tied: bool, quantize: str | None, kernels: str
) -> None:
    plain = randomise(tiny_model(norm_plan="pre+qk", qkv_bias=True, tie_word_embeddings=tied), 3)
    plain.save_pretrained(tmp_path / "model")
    found, expected = loaded(tmp_path / "model", quantize, kernels), fast_of(plain, quantize, kernels)
    tokens = random_tokens(1, 30)
    assert torch.equal(found(tokens), expected(tokens))
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in found.named_buffers())
    assert [n for n, p in found.named_parameters() if p.requires_grad] == []


def test_plain_loading_stays_plain(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    model = Llama.from_pretrained(tmp_path / "model")
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("large", [1e9, float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_weight_that_no_scale_can_hold_is_one_sentence(tmp_path: Path, quantize: str, large: float) -> None:
    plain = tiny_model()
    plain.layers[1].feed_forward.up_proj.weight[7, 40] = large
    plain.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointFormatError, match=f"holds numbers that {quantize} cannot") as caught:
        loaded(tmp_path / "model", quantize)
    assert "\n" not in str(caught.value)
    if large == 1e9:
        assert torch.isfinite(loaded(tmp_path / "model", None)(random_tokens(1, 5))).all()


def test_an_unknown_format_is_named_before_anything_is_read(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mini.engine.llm.load_model", None)
    with pytest.raises(RequestError, match=r"^unknown quantize 'int3'; known: auto, none, int8, int4$"):
        LLM(tiny_dir, quantize="int3", threads=1)
    with pytest.raises(RequestError, match=r"^unknown kernels 'on'; known: auto, off$"):
        LLM(tiny_dir, kernels="on", threads=1)


# --- GGUF ---


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # with rotary pairs side by side, and in halves
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_four_bit_blocks_are_not_requantized(tmp_path: Path, kind: Kind, family: str) -> None:
    theirs = random_model(family, 0, **SIZES)
    model = loaded(write_family(tmp_path / "model", theirs, kind), "int4")
    state = theirs.state_dict()
    for name, (matrix, part) in parts(model).items():
        assert matrix.name == "int4"
        key = f"model.{name}.weight".replace("attention", "self_attn").replace("feed_forward", "mlp")
        blocks = quants.quantize(state[key].numpy(), kind).reshape(matrix.parts[part], matrix.columns // 32, -1)
        for found, expected in zip(quantized_of(matrix, part), stored_codes(blocks, kind), strict=True):
            assert np.array_equal(found.numpy(), expected), name
        widened = quants.dequantize(blocks.reshape(matrix.parts[part], -1), kind)
        assert np.array_equal(floats_of(matrix, part).numpy(), widened), name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_eight_bit_blocks_are_not_requantized(tmp_path: Path, family: str) -> None:
    """The lowest, −128, too, which nothing here makes; of the head too, which has 8 bits beside matrices of 4."""
    path = write_family(tmp_path / "model", random_model(family, 0, **SIZES), Kind.Q8_0)
    data = np.memmap(path, np.uint8, mode="r+")
    names = {info.name: info for info in read_header(path).tensors.values() if info.type == "Q8_0"}
    for info in names.values():
        data[info.offset : info.offset + info.n_bytes].reshape(-1, 34)[::3, 5] = 128
    data.flush()
    plain, model = Llama.from_pretrained(path, dtype="float32"), loaded(path, "int8")
    weights = dict(plain.named_parameters())
    for name, (matrix, part) in (parts(model) | {"lm_head": (model.lm_head.linear, 0)}).items():
        assert matrix.name == "int8"
        assert matrix.qweight.min() == 0
        assert torch.equal(floats_of(matrix, part), weights[f"{name}.weight"]), name
    head = loaded(path, "int4").lm_head.linear
    assert torch.equal(floats_of(head, 0), weights["lm_head.weight"])
    tokens = random_tokens(1, 40)
    assert error(model(tokens), plain(tokens)) < 2e-2
    assert error(model(tokens[:, :1]), plain(tokens[:, :1])) < 2e-2  # quantized, not dequantized


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", FORMATS)
def test_reading_by_rows_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None, tied: bool
) -> None:
    monkeypatch.setattr("llama_mini.checkpoint.source._CHUNK", 1000)
    plain = randomise(tiny_model(vocab_size=100, tie_word_embeddings=tied), 3)
    plain.save_pretrained(tmp_path / "model")
    found, expected = loaded(tmp_path / "model", quantize), fast_of(plain, quantize)
    buffers, weights = dict(expected.named_buffers()), dict(expected.named_parameters())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in found.named_buffers())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.named_parameters())


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("quantize", FORMATS)
def test_a_gguf_file_answers_as_its_plain_reading_does(tmp_path: Path, kind: Kind, quantize: str | None) -> None:
    path = write_family(tmp_path / "model", random_model("llama", 0, **SIZES), kind)
    tokens = random_tokens(1, 40)
    found, expected = loaded(path, quantize)(tokens), Llama.from_pretrained(path, dtype="float32")(tokens)
    kept = quantize is None or (quantize == "int8") == (kind == Kind.Q8_0)  # but for the head, of 8 bits
    assert error(found, expected) < {True: 2e-2 if quantize else 2e-5, False: 0.03 if quantize == "int8" else 0.4}[kept]


def test_a_scale_of_a_file_that_float16_cannot_hold_is_one_sentence(tmp_path: Path) -> None:
    """The least value of a Q4_0 block is -8 scales."""
    path = write_family(tmp_path / "model", random_model("llama", 0, **SIZES), Kind.Q4_0)
    info = read_header(path).tensors["blk.1.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 2] = np.float16(9000).tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointFormatError, match="holds numbers that int4 cannot"):
        loaded(path, "int4")


def test_the_default_checkpoints_file_is_not_requantized(smollm2_dir: Path) -> None:
    path = smollm2_dir.parent / GGUF
    model, header, data = loaded(path, "int4", dtype="bfloat16"), read_header(path), np.memmap(path, np.uint8)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, (matrix, part) in parts(model).items():
        _, layer, _, projection = name.split(".")
        info = header.tensors[f"blk.{layer}.{names[projection]}.weight"]
        blocks = np.asarray(data[info.offset : info.offset + info.n_bytes]).reshape(*info.shape[:1], -1, 20)
        assert matrix.name == "int4"
        for found, expected in zip(quantized_of(matrix, part), stored_codes(blocks, Kind.Q4_1), strict=True):
            ours = found.numpy()
            if heads := {"q_proj": 9, "k_proj": 3}.get(projection):
                ours = interleaved(ours, heads)
            assert np.array_equal(ours, expected), name


# --- memory ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_that_are_counted_are_those_that_are_held(
    tmp_path: Path, quantize: str | None, tied: bool, dtype: torch.dtype
) -> None:
    """For dims that are multiples of a block of quantized weights; others are padded."""
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 128}
    plain = tiny_model(0, dtype, tie_word_embeddings=tied, **sizes)
    plain.save_pretrained(tmp_path / "model")
    fast = fast_of(plain, quantize)
    held = sum(tensor.nbytes for name, tensor in fast.state_dict(keep_vars=True).items())
    held += sum(module.n_bytes for module in fast.modules() if isinstance(module, PackedLinear))
    assert weight_bytes(open_checkpoint(tmp_path / "model"), dtype, quantize or "none") == held


def test_what_fits_only_in_fewer_bits_is_let_in(tmp_path: Path) -> None:
    tiny_model(dim=512, n_heads=8, hidden_dim=2048).save_pretrained(tmp_path / "model")
    source, cpu = open_checkpoint(tmp_path / "model"), torch.device("cpu")
    available = weight_bytes(source, torch.bfloat16, "none") - 10_000_000
    weights = partial(weight_bytes, source)
    with pytest.raises(CapacityError, match="the model needs"):
        check_fits(source.config, weights, torch.bfloat16, 1, cpu, available)
    check_fits(source.config, weights, torch.bfloat16, 1, cpu, available, quantize="int4")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["", GGUF])
def test_quantizing_never_holds_the_whole_model_as_floats(smollm2_dir: Path, name: str, quantize: str) -> None:
    """Beside the quantized weights: one tensor, at most the embedding, and 4,096 rows of it in float32."""
    path = smollm2_dir.parent / name if name else smollm2_dir
    source = open_checkpoint(path)
    config = source.config
    embedding = 2 * config.vocab_size * config.dim
    codes = weight_bytes(source, torch.bfloat16, quantize)
    rows = 4 * 4096 * config.dim
    assert (
        codes < peak(lambda: loaded(path, quantize, dtype="bfloat16")) < codes + embedding + 5 * rows < 2 * 134_515_008
    )


# --- quality ---


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quantize", "most"), [("", "int8", 0.006), (GGUF, "int4", 0.01)])
def test_a_format_costs_few_nats(smollm2_dir: Path, name: str, quantize: str, most: float) -> None:
    ids = Tokenizer.from_pretrained(smollm2_dir).encode(TEXT.read_text(encoding="utf-8"))[:2048]

    def nll(quantize: str | None) -> float:
        path = smollm2_dir.parent / name if name else smollm2_dir
        scores = LLM(path, dtype="bfloat16", quantize=quantize or "none", threads=1).score(ids)[1:]
        return -float(np.mean(scores))

    assert abs(nll(quantize) - nll(None)) < most


def test_norms_and_the_untied_embedding_stay_as_they_are(tmp_path: Path) -> None:
    plain = tiny_model(norm_plan="pre+qk")
    plain.save_pretrained(tmp_path / "model")
    model = loaded(tmp_path / "model", "int4")
    assert torch.equal(model.tok_embeddings.weight, plain.tok_embeddings.weight)
    norms = {name: module for name, module in plain.named_modules() if isinstance(module, RMSNorm)}
    assert all(torch.equal(model.get_submodule(name).weight, norm.weight) for name, norm in norms.items())
    assert model.lm_head.linear.name == "int8"
