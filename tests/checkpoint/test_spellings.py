"""Right checkpoints in unusual spellings, as people have them: each opens, and equals what transformers makes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_mini.checkpoint.gguf.model import open_gguf
from llama_mini.checkpoint.hf.config import from_hf
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointPathError, LlamaMiniWarning, TokenizerError
from llama_mini.generate import main
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.tokenizer import open_tokenizer
from tests.checkpoint.gguf.gguf_files import write_family
from tests.checkpoint.meta.test_directory import PARAMS, meta_tensors, model
from tests.tiny_families import logits, random_model
from tests.tiny_models import HF_TINY, random_tokens

TOKENS = random_tokens(1, 40, vocab_size=96)


def expect(path: Path, theirs: PreTrainedModel) -> None:
    torch.testing.assert_close(Llama.from_pretrained(path)(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)


def edit_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


# --- weights ---


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    random_model("llama", 0, rms_norm_eps=1e-3).save_pretrained(tmp_path / "other", max_shard_size="30KB")
    for file in (tmp_path / "other").glob("model*"):
        shutil.copy(file, tmp_path / file.name)
    with pytest.warns(LlamaMiniWarning, match=r"both model\.safetensors and .*: only the former is read"):
        ours = Llama.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(ours(TOKENS), logits(theirs, TOKENS), rtol=0, atol=2e-5)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.filterwarnings("ignore:.* has no tokenizer")
def test_a_tied_model_stored_under_the_name_of_its_head(tmp_path: Path, pickled: bool) -> None:
    theirs = random_model("llama", 0, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    if pickled:
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save({n.removeprefix("model."): t for n, t in state.items()}, tmp_path / "hf" / "pytorch_model.bin")
        state["embed_tokens.weight"] = state["lm_head.weight"]
        torch.save({n.removeprefix("model."): t for n, t in state.items()}, tmp_path / "hf" / "pytorch_model.bin")
        convert(tmp_path / "hf", tmp_path / "converted")
        expect(tmp_path / "converted", theirs)
    else:
        save_file(state, tmp_path / "hf" / "model.safetensors")
        expect(tmp_path / "hf", theirs)


def test_a_table_of_old_checkpoints_does_not_decide_the_dtype(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, (tensor, _) in meta_tensors(model()).items()}
    save_file(tensors | {"rope.freqs": torch.ones(6, dtype=torch.complex64)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    assert open_checkpoint(tmp_path).dtype == torch.bfloat16


# --- config.json ---


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_an_explicit_null_is_not_the_familys_default(tmp_path: Path, model_type: str) -> None:
    changes = {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}
    theirs = random_model(model_type, 0, num_key_value_heads=None, **changes)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, num_key_value_heads=None, layer_types=None, **changes)
    assert Llama.from_pretrained(tmp_path).config.sliding_window is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(TOKENS), logits(again, TOKENS), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "sliding_window"])
def test_a_null_size_is_no_fault_in_any_family(model_type: str, key: str) -> None:
    config = from_hf({"model_type": model_type} | HF_TINY | {key: None})
    assert config.head_dim == (128 if model_type == "qwen3" and key != "head_dim" else 48 // 6)
    assert config.n_kv_heads == (6 if key == "num_key_value_heads" else 2)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"quantization_config": {}},
        {"use_qk_norm": False, "qk_layernorm": False, "use_mrope": False},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "yarn", "finetuned": True} | YARN},
        {"rope_theta": 2**70},
        {"max_sequence_length": 2048, "temperature": 0.6, "unsloth_version": "2024.9", "do_sample": True},
    ],
)
def test_published_keys_are_read_without_a_warning(changes: dict[str, Any]) -> None:
    assert from_hf({"model_type": "llama"} | HF_TINY | changes)


def test_qwen2_has_its_biases_whatever_is_said() -> None:
    config = from_hf({"model_type": "qwen2", "attention_bias": True} | HF_TINY)
    assert (config.qkv_bias, config.o_bias) == (True, False)


# --- GGUF ---


@pytest.mark.parametrize(
    "metadata",
    [
        {"attention__clamp_kqv": 0.0, "logit_scale": 1.0, "pooling_type": 0, "attention__max_alibi_bias": 0.0},
        {"leading_dense_block_count": 0, "expert_count": 0},
    ],
)
def test_settings_that_change_nothing_are_accepted(tmp_path: Path, metadata: dict[str, Any]) -> None:
    theirs = random_model("llama", 0)
    expect(write_family(tmp_path / "model", theirs, **metadata), theirs)


def test_a_merged_file_and_one_value_for_every_layer(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    changes = {"split.count": 0, "llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [64, 64]}
    plain = open_gguf(write_gguf(tmp_path / "plain")).config
    assert open_gguf(write_gguf(tmp_path / "merged", changes)).config == plain


def test_special_ids_that_do_not_exist_are_warned_of(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    changes: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": 2**32 - 1 for name in ("bos", "eos", "padding")}
    path = write_gguf(tmp_path / "tiny", changes | {"tokenizer.ggml.add_space_prefix": True})
    with pytest.warns(LlamaMiniWarning) as caught:
        config = open_gguf(path).config
    expected = [f"{path}: {key} must be a token from 0 to 262, not 4294967295; ignored" for key in changes]
    assert [str(warning.message) for warning in caught] == expected
    assert (config.bos_id, config.eos_ids, config.pad_id) == (None, (), None)
    with pytest.warns(LlamaMiniWarning, match="_token_id must be a token .*; ignored"):
        tokenizer = Tokenizer.from_pretrained(path)
    assert tokenizer.encode("the")
    assert tokenizer.eos_ids == {0, 2}  # by their names


# --- tokenizers that do not fit, devices and names that cannot be ---


def test_more_words_than_rows_are_refused_and_special_tokens_warned_of(tmp_path: Path, tiny_dir: Path) -> None:
    for rows in (260, 258, 200):
        directory = tmp_path / str(rows)
        random_model("llama", 0, vocab_size=rows).save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(tiny_dir / name, directory / name)
    assert open_tokenizer(open_checkpoint(tmp_path / "260")).vocab_size == 260
    with pytest.warns(LlamaMiniWarning, match="260 tokens, but the embedding has 258 rows: the added tokens from 258"):
        open_tokenizer(open_checkpoint(tmp_path / "258"))
    with pytest.raises(TokenizerError, match="260 tokens, but the embedding has 200 rows; they belong to different"):
        open_tokenizer(open_checkpoint(tmp_path / "200"))


def test_words_and_merges_alone_say_what_makes_a_tokenizer_of_them(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(TokenizerError, match=r"vocab\.json and merges\.txt with transformers' AutoTokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["", "a" * 300 + "/b", "a\0b"])
def test_names_that_no_file_can_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", name, "hi"]) == 3
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("device", "message"), [("foo", "unknown device 'foo': give cpu"), ("meta", "device 'meta' cannot be used: ")]
)
def test_devices_that_cannot_be_used(
    tiny_dir: Path, device: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (["--info"], ["hi"]):
        assert main(["--model", str(tiny_dir), "--device", device, *args]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    random_model("llama", 0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointPathError, match=r"model\.safetensors: it is a directory"):
        open_checkpoint(tmp_path)
