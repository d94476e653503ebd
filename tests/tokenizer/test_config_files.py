"""The files beside a vocabulary: what is read, and what a broken one does."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from llama_mini.checkpoint.io.files import VOCABULARIES
from llama_mini.errors import CheckpointPathError, LlamaMiniWarning, TokenizerError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.config_files import AddedToken, ConfigFiles, read_config_files

Write = Callable[[dict[str, Any]], Path]


def test_an_empty_directory_says_nothing(tmp_path: Path) -> None:
    assert read_config_files(tmp_path) == ConfigFiles()


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe", "{" * 100_000])
def test_a_broken_generation_config_warns_and_the_next_file_decides(write_directory: Write, content: Any) -> None:
    path = write_directory({"generation_config.json": content, "config.json": {"eos_token_id": 5, "bos_token_id": 4}})
    with pytest.warns(LlamaMiniWarning, match="ignored: .*generation_config.json"):
        files = read_config_files(path)
    assert (files.eos_ids, files.bos_id) == ((5,), 4)


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True, 2.0, [[1]]])
def test_an_invalid_id_warns(write_directory: Write, value: Any) -> None:
    path = write_directory({"generation_config.json": {"eos_token_id": value}, "config.json": {"eos_token_id": 5}})
    with pytest.warns(LlamaMiniWarning, match="generation_config.json ignored: eos_token_id must be a token id"):
        assert read_config_files(path).eos_ids == (5,)


@pytest.mark.parametrize("value", [-1, [-1], None, []])
def test_no_id_leaves_it_to_the_next_file(write_directory: Write, value: Any) -> None:
    path = write_directory({"generation_config.json": {"eos_token_id": value}, "config.json": {"eos_token_id": 5}})
    assert read_config_files(path).eos_ids == (5,)


def test_a_checkpoint_without_generation_config_warns(write_directory: Write) -> None:
    path = write_directory({"config.json": {"eos_token_id": [5, 6], "vocab_size": 9}})
    with pytest.warns(LlamaMiniWarning, match="has no generation_config.json"):
        files = read_config_files(path)
    assert (files.eos_ids, files.model_vocab_size) == ((5, 6), 9)


def test_a_processor_has_the_template_of_an_older_checkpoint(write_directory: Write) -> None:
    path = write_directory({"chat_template.json": {"chat_template": "old"}, "tokenizer_config.json": {}})
    assert read_config_files(path).chat_templates == {"default": "old"}
    write_directory({"tokenizer_config.json": {"chat_template": "new"}})
    assert read_config_files(path).chat_templates == {"default": "new"}
    write_directory({"tokenizer_config.json": {}, "chat_template.json": {"chat_template": 3}})
    with pytest.raises(TokenizerError, match=r"chat_template\.json: chat_template is 3, expected a string or a list"):
        read_config_files(path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": {"7": {"content": "x", "rstrip": "y"}}},
        {"chat_template": 3},
        {"chat_template": [{"name": "default"}]},
    ],
)
def test_a_broken_tokenizer_config_is_an_error(write_directory: Write, content: Any) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        read_config_files(write_directory({"tokenizer_config.json": content}))


def test_older_files_name_tokens_too(write_directory: Write) -> None:
    path = write_directory(
        {
            "tokenizer_config.json": {"eos_token": "</s>", "bos_token": None},
            "special_tokens_map.json": {"eos_token": {"content": "<end>"}, "pad_token": "<pad>"},
            "added_tokens.json": {"<end>": 32_000, "<think>": 32_001},
        }
    )
    files = read_config_files(path)
    assert files.names == {"eos_token": "<end>", "pad_token": "<pad>"}
    end, think = AddedToken(id=32_000, content="<end>", special=True), AddedToken(id=32_001, content="<think>")
    assert files.added_tokens == (end, think)
    write_directory({"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "<x>", "rstrip": True}}}})
    files = read_config_files(path)
    assert files.names == {}
    assert files.added_tokens == (AddedToken(id=7, content="<x>", rstrip=True),)


def test_templates_in_files_of_their_own_win(write_directory: Write) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
    path = write_directory({"tokenizer_config.json": {"chat_template": "inline"}})

    def templates() -> Mapping[str, str]:
        """They are also those that transformers reads."""
        theirs = AutoTokenizer.from_pretrained(path).chat_template
        ours = read_config_files(path).chat_templates
        assert ours == ({"default": theirs} if isinstance(theirs, str) else theirs)
        return ours

    write_directory({"tokenizer.json": tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()})
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert templates() == {"default": "inline"}
    write_directory({"tokenizer_config.json": kind | {"chat_template": named}})
    assert templates() == {"tool_use": "tools", "default": "listed"}
    write_directory({"tokenizer_config.json": kind | {"chat_template": named[:1]}})
    assert templates() == {"tool_use": "tools"}
    write_directory({"chat_template.jinja": "file"})
    assert templates() == {"default": "file"}
    (path / "additional_chat_templates").mkdir()
    write_directory({"additional_chat_templates/rag.jinja": "documents"})
    assert templates() == {"default": "file", "rag": "documents"}
    write_directory({"chat_template.jinja": b"\xff"})
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8 text: invalid start byte at byte 0"):
        read_config_files(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tekken.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    ],
)
def test_what_is_there_but_no_file_is_named(
    name: str, make: Callable[[Path], None], tmp_path: Path, tiny_dir: Path
) -> None:
    if name not in VOCABULARIES:
        shutil.copy(tiny_dir / "tokenizer.json", tmp_path / "tokenizer.json")
    make(tmp_path / name)
    sentence = f"cannot read {tmp_path / name}: it is a {'pipe' if make is os.mkfifo else 'directory'}; give a file"
    if name == "generation_config.json":
        with pytest.warns(LlamaMiniWarning, match=f"^{name} ignored: {sentence}$"):
            Tokenizer.from_pretrained(tmp_path)
    else:
        with pytest.raises((CheckpointPathError, TokenizerError), match=f"^{sentence}$"):
            Tokenizer.from_pretrained(tmp_path)
