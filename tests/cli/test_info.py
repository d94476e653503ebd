"""--info on every format: it says what is there, reads no tensor's data, and refuses what loading would refuse."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from llama_mini.cli.info import beyond_llama, describe
from llama_mini.errors import CheckpointMismatchError
from llama_mini.generate import main
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.rope_scaling import YarnScaling
from tests.checkpoint.gguf.gguf_files import write_family
from tests.checkpoint.meta.test_directory import PARAMS, meta_tensors, model
from tests.tiny_families import random_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def rows(path: Path) -> dict[str, str]:
    return {line[:15].strip(): line[15:] for line in describe(path, dtype="bfloat16").splitlines()}


def with_tokenizer(directory: Path, tiny_dir: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(tiny_dir / name, directory / name)
    return directory


def test_a_hugging_face_directory(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(tiny_dir)
    n_parameters = sum(p.numel() for p in Llama.from_pretrained(tiny_dir).parameters())
    assert found["path"] == str(tiny_dir)
    assert found["format"] == "Hugging Face directory, 1 safetensors file"
    assert found["family"] == "llama"
    assert found["parameters"].startswith(f"{n_parameters:,} in 21 tensors, stored as F32 (")
    assert found["shape"] == "2 layers, dim 32, hidden 64, 4 heads of 10, 2 KV heads, untied head"
    assert found["norms"] == "pre: 5 norms, eps 1e-05"
    assert found["context"] == "512 tokens, rope base 10,000, llama3 × 8"
    assert found["tokenizer"] == "tokenizer.json, 260 tokens, BOS 256, EOS 257, 259"
    assert found["chat template"] == "yes"
    assert found["memory"].startswith("weights 0.1 MiB in bfloat16, cache ")
    assert main(["--model", str(tiny_dir), "--info", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.splitlines()[:6] == describe(tiny_dir, "bfloat16").splitlines()[:6]


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [
        ("mistral", "pre: 7 norms"),
        ("qwen2", "pre: 7 norms"),
        ("qwen3", "pre+qk: 13 norms"),
        ("olmo2", "out+qk:full, each rounded last: 13 norms"),
    ],
)
def test_every_family(tmp_path: Path, tiny_dir: Path, model_type: str, norms: str) -> None:
    random_model(model_type, 0, vocab_size=260).save_pretrained(tmp_path)
    found = rows(with_tokenizer(tmp_path, tiny_dir))
    assert found["family"] == model_type
    assert found["norms"].startswith(norms)


def test_windows_are_told(tmp_path: Path, tiny_dir: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 1, "vocab_size": 260}
    random_model("qwen2", 0, **window).save_pretrained(tmp_path)
    assert rows(with_tokenizer(tmp_path, tiny_dir))["context"].endswith(", window of 1,024 in 2 of 3 layers")


def test_what_a_model_has_beyond_llama(tmp_path: Path, tiny_dir: Path) -> None:
    assert "beyond LLaMA" not in rows(tiny_dir)
    changes = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0}
    random_model("gemma3_text", 1, hidden_size=36, attention_bias=False, **changes).save_pretrained(tmp_path)
    found = rows(tmp_path)
    assert found["context"].endswith(", linear × 2.5, window of 5 in 3 of 4 layers with rope base 2,000")
    expected = "activation gelu_tanh; attention scale 0.25; embedding times 6; logits capped at 30"
    assert found["beyond LLaMA"] == expected


def test_every_setting_beyond_llama_is_told() -> None:
    config = LlamaConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=16)
    told = {
        "rotary_dim": (4, "4 of 8 elements of a head rotated"),
        "unrotated_layers": ((1,), "no rotary embedding in 1 of 2 layers"),
        "attention_scale": (1.0, "attention scale 1"),
        "attention_softcap": (50.0, "scores capped at 50"),
        "qk_norm_after_rope": (True, "q and k norms after rotary embedding"),
        "qkv_bias": (True, "biases of q, k, v"),
        "o_bias": (True, "biases of o"),
        "mlp_bias": (True, "biases of MLP"),
        "activation": ("relu2", "activation relu2"),
        "gated_mlp": (False, "no gate"),
        "embedding_scale": (6.0, "embedding times 6"),
        "logit_scale": (0.0625, "logits times 0.0625"),
        "logit_softcap": (30.0, "logits capped at 30"),
        "norm_plan": ("parallel", "attention and MLP in parallel"),
        "rope_scaling": (YarnScaling(factor=4, original_max_seq_len=64, q_growth=0.1), "queries scaled by position"),
    }
    in_other_rows = "dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size max_seq_len norm_eps rope_theta "
    in_other_rows += "sliding_window sliding_layers sliding_rope_theta sliding_rope_scaling "
    in_other_rows += "tie_word_embeddings bos_id eos_ids pad_id"
    assert {field.name for field in fields(config)} == set(told) | set(in_other_rows.split())
    assert beyond_llama(config) == ""
    for name, (value, text) in told.items():
        assert beyond_llama(replace(config, **{name: value})) == text  # type: ignore[arg-type]


def test_a_meta_directory(tmp_path: Path, tiny_dir: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    tensors = {name: tensor.bfloat16() for name, (tensor, _) in meta_tensors(model(vocab_size=260)).items()}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    found = rows(with_tokenizer(tmp_path, tiny_dir))
    assert found["format"] == "Meta directory, 1 safetensors file"
    assert "stored as BF16" in found["parameters"]


def test_the_default_checkpoint_and_its_gguf_file(smollm2_dir: Path, smollm2_gguf: Path) -> None:
    gguf = rows(smollm2_gguf)
    assert gguf["format"] == "GGUF file, Q4_1, Q8_0"
    assert gguf["parameters"].startswith("134,515,008 in 272 tensors, stored as Q4_1 (63.3 MiB), Q8_0 (28.7 MiB), F32")
    assert gguf["tokenizer"].startswith("GGUF byte-level BPE (smollm), 49,152 tokens, BOS 1, EOS ")
    converted = rows(smollm2_dir)
    for key in ("family", "shape", "norms", "context", "chat template"):
        assert gguf[key] == converted[key]
    assert "kept as" not in gguf["parameters"] + converted["parameters"]  # `rows` asks for a dtype, so for floats
    kept = describe(smollm2_gguf)
    assert "MiB); kept as 4-bit codes (int4), 8-bit codes (int8)\n" in kept
    assert re.search(r"memory +weights 92\.\d MiB in int4, int8 and (bfloat16|float32), cache", kept)


def test_what_is_quantised_again_is_not_said_to_be_kept(tmp_path: Path) -> None:
    """Up alone has 6 bits, so that gate and up are joined in int8, which is no format of theirs."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = random_model("qwen3", 0, head_dim=64, **sizes)
    mixed = describe(write_family(tmp_path / "mixed", theirs, types={"ffn_up": "Q6_K", "": "Q4_K"}))
    assert "MiB); kept as 4-bit codes (q4_k); others quantised again to 8-bit codes (int8)\n" in mixed
    none_kept = describe(write_family(tmp_path / "none", theirs, types={"": "IQ3_XXS"}))
    assert "MiB); quantised again to 8-bit codes (int8)\n" in none_kept


def test_a_checkpoint_without_a_tokenizer(
    tmp_path: Path, write_gguf: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    random_model("llama", 0).save_pretrained(tmp_path / "bare")
    keys = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id")
    absent: dict[str, Any] = {f"tokenizer.ggml.{key}": None for key in keys}
    for path, tokenizer in (
        (tmp_path / "bare", "none (the directory has none of tokenizer.json, tekken.json, tokenizer.model)"),
        (write_gguf(tmp_path / "bare.gguf", absent), "none (the file has no tokenizer.ggml.model)"),
        (
            write_gguf(tmp_path / "none.gguf", absent | {"tokenizer.ggml.model": "none"}),
            "none (the file has no tokenizer.ggml.model)",
        ),
    ):
        assert main(["--model", str(path), "--info"]) == 0
        found = {line[:15].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}
        assert (found["tokenizer"], found["chat template"]) == (tokenizer, "no")
        assert "layers, dim" in found["shape"]
    (tmp_path / "bare" / "tokenizer.json").write_text("{")  # a broken one is an error, as in loading
    assert main(["--model", str(tmp_path / "bare"), "--info"]) == 3
    assert "tokenizer.json is not JSON" in capsys.readouterr().err


def test_no_data_is_read(tmp_path: Path, tiny_dir: Path) -> None:
    """All weights NaN: loading refuses it, describing does not look."""
    shutil.copytree(tiny_dir, tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = np.full((len(data) - start) // 4, np.nan, np.float32).tobytes()
    path.write_bytes(data)
    assert rows(tmp_path / "nan")["shape"] == rows(tiny_dir)["shape"]


def test_tensors_are_checked_all_the_same(tmp_path: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_dir, tmp_path / "other")
    raw = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw | {"intermediate_size": 65}))
    with pytest.raises(CheckpointMismatchError, match="6 misshaped"):
        describe(tmp_path / "other")
    assert main(["--model", str(tmp_path / "other"), "--info"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
