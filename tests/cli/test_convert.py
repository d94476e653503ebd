"""A converted directory against transformers, which loads it as it is; whole or absent, whatever happens."""

import json
import os
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama_mini.checkpoint.io.files import VOCABULARIES
from llama_mini.cli import convert as convert_module
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointMismatchError, CheckpointPathError, ConfigError, TokenizerError
from llama_mini.tokenizer import Tokenizer

Write = Callable[..., Path]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_it_as_it_is(
    tmp_path: Path, write_gguf: Write, tiny_llama: Callable[..., LlamaForCausalLM], tied: bool
) -> None:
    target = tmp_path / "tiny"
    convert(write_gguf(tmp_path / "tiny.gguf", tied=tied), target, "bfloat16")
    loaded, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values())
    assert loaded.dtype == torch.bfloat16
    expected = tiny_llama(tied)
    assert loaded.generation_config.eos_token_id == [2, 0]  # the file's own and <|endoftext|>
    for name in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(loaded.config, name) == getattr(expected.config, name)
    assert loaded.generation_config.pad_token_id == 2
    rounded = {name: values.to(torch.bfloat16) for name, values in expected.state_dict().items()}
    for name, values in rounded.items():
        assert torch.equal(loaded.state_dict()[name], values), name
    expected.load_state_dict(rounded)  # copied into float32
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokens = torch.arange(30).reshape(1, 30)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)

    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("the 12") == ["t", "he", "Ġ", "1", "2"]
    assert tokenizer.apply_chat_template([{"content": "7"}], tokenize=False) == "<|im_start|>7<|im_end|>\n"
    assert b"<|im_end|>\r\n{% endfor %}" in (target / "chat_template.jinja").read_bytes()  # to the letter


def test_no_template_is_lost(tmp_path: Path, write_gguf: Write) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {"tokenizer.chat_template.tool_use": "{{ tools }}"})
    convert(path, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    for target in (tmp_path / "once", tmp_path / "twice"):
        assert Tokenizer.from_pretrained(target).template_variables >= {"tools"}
        templates = AutoTokenizer.from_pretrained(target).chat_template
        assert templates.keys() == {"default", "tool_use"}
        assert templates["tool_use"] == "{{ tools }}"
    with pytest.raises(CheckpointPathError, match=r"'\.\./x\.jinja' is not a plain file name"):
        convert(write_gguf(tmp_path / "bad.gguf", {"tokenizer.chat_template.../x": "x"}), tmp_path / "bad")


def test_a_vocabulary_under_any_name_is_copied(tmp_path: Path, tiny_dir: Path) -> None:
    for name in VOCABULARIES:
        source = tmp_path / f"with {name}"
        source.mkdir()
        for copied in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(tiny_dir / copied, source)
        shutil.copy(tiny_dir / "tokenizer_config.json", source)  # else a tokenizer.model would be Meta's
        (source / name).write_text("a vocabulary")
        convert(source, tmp_path / name)
        assert (tmp_path / name / name).read_text() == "a vocabulary"


def test_anyone_may_read_what_the_mask_allows(tmp_path: Path, write_gguf: Write) -> None:
    before = os.umask(0o022)
    try:
        convert(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tiny")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tiny").iterdir()}
    assert modes == {0o644}
    assert stat.S_IMODE((tmp_path / "tiny").stat().st_mode) == 0o755


def test_nothing_goes_to_standard_output(tmp_path: Path, write_gguf: Write, capfd: pytest.CaptureFixture[str]) -> None:
    convert(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "tiny")
    assert capfd.readouterr().out == ""


def test_a_file_without_a_template_makes_none(tmp_path: Path, write_gguf: Write) -> None:
    convert(write_gguf(tmp_path / "tiny.gguf", {"tokenizer.chat_template": None}), tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "chat_template.jinja").exists()
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"llama.block_count": 3}, CheckpointMismatchError),
        ({"llama.expert_count": 2}, ConfigError),
        ({"tokenizer.ggml.pre": "unheard-of"}, TokenizerError),
    ],
)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path, write_gguf: Write, changes: dict[str, object], error: type[Exception]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", changes)
    with pytest.raises(error):
        convert(path, tmp_path / "tiny")
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_more_tokens_than_rows_are_refused(tmp_path: Path, write_gguf: Write) -> None:
    tokens = [*map(chr, range(0x4E00, 0x4E00 + 263)), "一丁"]
    changes = {"tokens": tokens, "token_type": [1] * 264, "merges": ["一 丁"]}
    path = write_gguf(tmp_path / "tiny.gguf", {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    with pytest.raises(TokenizerError, match="264 tokens, but the embedding has 263 rows"):
        convert(path, tmp_path / "tiny")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, write_gguf: Write) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(CheckpointPathError, match=r"cannot write .*model\.safetensors: .*File too large"):
            convert(path, tmp_path / "tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path, write_gguf: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(convert_module, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "tiny")
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_a_tokenizer_that_is_no_file_is_named(tmp_path: Path, tiny_dir: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(CheckpointPathError, match=r"tokenizer.json: it is a pipe; give a file$"):
        convert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
