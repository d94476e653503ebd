"""The llama architecture of a GGUF file against the model it was written from and against transformers' own reading."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama_mini.checkpoint.families import key_table
from llama_mini.checkpoint.gguf.header import read_header
from llama_mini.checkpoint.gguf.model import gguf_config
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError
from llama_mini.model.llama import Llama

Write = Callable[..., Path]


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors under their Hugging Face names."""
    model = Llama.from_pretrained(path, dtype="float32")
    return {to_file_name(name, key_table("llama")): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_the_file_was_written_from(
    tmp_path: Path, write_gguf: Write, tiny_llama: Callable[..., LlamaForCausalLM], tied: bool
) -> None:
    expected = tiny_llama(tied).state_dict()
    if tied:
        del expected["lm_head.weight"]
    found = read(write_gguf(tmp_path / "tiny.gguf", tied=tied))
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("quantised", [False, True])
def test_logits_are_those_of_transformers_own_reading(
    tmp_path: Path, write_gguf: Write, tiny_llama: Callable[..., LlamaForCausalLM], quantised: bool
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {"general.name": "tiny"}, tied=False, quantised=quantised)
    theirs, ours = tiny_llama(False), tiny_llama(False)
    theirs.load_state_dict(load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"])
    ours.load_state_dict(read(path))
    tokens = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        assert torch.equal(ours(tokens).logits, tiny_llama(False)(tokens).logits) is not quantised


def test_config_is_that_of_the_model(tmp_path: Path, write_gguf: Write) -> None:
    config = gguf_config(read_header(write_gguf(tmp_path / "tiny.gguf")))
    assert (config.dim, config.hidden_dim, config.n_layers) == (32, 64, 2)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 2, 8)
    assert (config.max_seq_len, config.rope_theta, config.rope_scaling) == (128, 100_000.0, None)
    assert config.norm_eps == 1e-5  # not the float32 in the file, 9.999999747378752e-06
    assert config.tie_word_embeddings is True
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), 2)


def test_absent_keys_have_the_formats_defaults(tmp_path: Path, write_gguf: Write) -> None:
    names = ["attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size"]
    path = write_gguf(tmp_path / "tiny.gguf", {f"llama.{name}": None for name in names})
    config = gguf_config(read_header(path))
    assert (config.n_kv_heads, config.rope_theta, config.head_dim, config.vocab_size) == (4, 10_000.0, 8, 263)


def test_a_head_dim_of_its_own(tmp_path: Path, write_gguf: Write) -> None:
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    path = write_gguf(tmp_path / "tiny.gguf", {f"llama.{key}": 16 for key in keys} | {"llama.attention.head_count": 2})
    assert gguf_config(read_header(path)).head_dim == 16


REFUSED = {
    "architecture": (
        {"general.architecture": "gpt2"},
        ConfigError,
        "unknown general.architecture 'gpt2'; known: llama, qwen2, qwen3",
    ),
    "scaling": (
        {"llama.rope.scaling.type": "su"},
        ConfigError,
        "unknown rope.scaling.type 'su'; known: none, linear, yarn",
    ),
    "factor": ({"llama.rope.scaling.factor": 0.5}, ConfigError, "factor must be .* from 1 to 1000000000000, not 0.5"),
    "experts": ({"llama.expert_count": 8}, ConfigError, "llama.expert_count is 8"),
    "soft-capping": ({"llama.final_logit_softcapping": 30.0}, ConfigError, "final_logit_softcapping is 30.0"),
    "window": ({"llama.attention.sliding_window": 4096}, ConfigError, "attention.sliding_window is 4096"),
    "unheard of": ({"llama.new_trick": [1, 2]}, ConfigError, "llama.new_trick is .* not implemented"),
    "partial rotary": ({"llama.rope.dimension_count": 4}, ConfigError, "rope.dimension_count is 4; only .* 8"),
    "value length": ({"llama.attention.value_length": 16}, ConfigError, "value_length is 16; only .* 8"),
    "per layer": ({"llama.attention.head_count": [4, 2]}, ConfigError, "head_count differs between layers"),
    "no eps": ({"llama.attention.layer_norm_rms_epsilon": None}, ConfigError, "rms_epsilon is missing"),
    "no layers": ({"llama.block_count": None}, ConfigError, "llama.block_count is missing"),
    "no heads": ({"llama.attention.head_count": 0}, ConfigError, "n_heads must be .* not 0"),
    "text": ({"llama.embedding_length": "32"}, ConfigError, "dim must be .* not '32'"),
    "vocabulary": ({"llama.vocab_size": 300}, ConfigError, "vocab_size is 300, but token_embd.weight has 263 rows"),
    "token": ({"tokenizer.ggml.bos_token_id": "a"}, ConfigError, "bos_token_id must be a token from 0 to .*, not 'a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, write_gguf: Write, case: str) -> None:
    changes, error, sentence = REFUSED[case]
    path = write_gguf(tmp_path / "tiny.gguf", changes)
    with pytest.raises(error, match=sentence) as caught:
        gguf_config(read_header(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_what_changes_nothing_is_accepted(tmp_path: Path, write_gguf: Write) -> None:
    neutral = {
        "general.type": "model",
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.expert_count": 0,
        "llama.attention.causal": True,
        "llama.tensor_data_layout": "Meta AI original pth",
    }
    plain = gguf_config(read_header(write_gguf(tmp_path / "plain.gguf")))
    assert gguf_config(read_header(write_gguf(tmp_path / "neutral.gguf", neutral))) == plain


def test_missing_and_unexpected_tensors_come_in_one_message(tmp_path: Path, write_gguf: Write) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(CheckpointMismatchError) as caught:
        Llama.from_pretrained(path)
    assert "1 missing: blk.1.attn_q.weight; 1 unexpected: blk.1.attn_x.weight" in str(caught.value)


def test_a_norm_of_another_family_is_named(tmp_path: Path, write_gguf: Write) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_norm.weight", b"blk.1.attnx_norm.weigh"))
    with pytest.raises(CheckpointMismatchError, match=r"missing: blk\.1\.attn_norm\.weight; .*attnx_norm"):
        Llama.from_pretrained(path)


def test_a_file_without_an_embedding_is_refused(tmp_path: Path, write_gguf: Write) -> None:
    header = read_header(write_gguf(tmp_path / "tiny.gguf"))
    del header.tensors["token_embd.weight"]
    with pytest.raises(CheckpointFormatError, match=r"has no token_embd\.weight"):
        gguf_config(header)


def test_nan_in_a_norm_is_named(tmp_path: Path, write_gguf: Write) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    info = read_header(path).tensors["blk.1.ffn_norm.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=r"blk\.1\.ffn_norm\.weight holds NaN or infinity"):
        Llama.from_pretrained(path)


@pytest.mark.parametrize(("value", "expected"), [(1e-5, 1e-5), (1e-6, 1e-6), (3.1e-7, 3.1e-7)])
def test_eps_is_the_short_decimal(tmp_path: Path, write_gguf: Write, value: float, expected: float) -> None:
    assert float(np.float32(value)) != value
    path = write_gguf(tmp_path / "tiny.gguf", {"llama.attention.layer_norm_rms_epsilon": value})
    assert gguf_config(read_header(path)).norm_eps == expected
