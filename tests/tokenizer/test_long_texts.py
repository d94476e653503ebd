"""A million characters, in a row or mixed: about linear time in every vocabulary and in chats, or a clear refusal."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_mini.errors import RequestError
from llama_mini.tokenizer import Tokenizer, chat

pytestmark = pytest.mark.slow  # a million characters in a row are tried with each kind of file, too

Write = Callable[[dict[str, Any]], Path]
MILLION = 1_000_000
KINDS = ["byte-level", "metaspace", "tiktoken", "sentencepiece"]
MIXED = "".join(random.Random(0).choices("ab <|>_/eot_id\n\r\t0123é日🎉\u0301", k=MILLION))
TEXTS = {
    "a": "a" * MILLION,
    "caret": "^" * MILLION,
    "space": " " * MILLION,
    "newline": "\n" * MILLION,
    "digit": "1" * MILLION,
    "emoji": "🎉" * MILLION,
    "mixed": MIXED,
}


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of each kind: LLaMA 3's tiktoken file, small ones of the others."""
    path = tmp_path_factory.mktemp("vocabulary")
    if request.param == "tiktoken":
        files = request.getfixturevalue("llama3_files")
        (path / "tokenizer.model").write_bytes(files.tiktoken.read_bytes())
    elif request.param == "sentencepiece":
        (path / "tokenizer.model").write_bytes(request.getfixturevalue("train_sentencepiece")())
    elif request.param == "byte-level":
        (path / "tokenizer.json").write_text(json.dumps(request.getfixturevalue("byte_level_spec")()))
    else:
        spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        spec = request.getfixturevalue("llama_2_spec")() | {"normalizer": None, "pre_tokenizer": spaces}
        (path / "tokenizer.json").write_text(json.dumps(spec))
    return path


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_ten_times_the_text_takes_about_ten_times_as_long(directory: Path, text: str) -> None:
    tokenizer = Tokenizer.from_pretrained(directory)
    tenth = text[: MILLION // 10]
    assert tokenizer.decode(tokenizer.encode(tenth)) in (tenth, tenth[1:])  # Metaspace puts no space before a space
    small = min(seconds(lambda: tokenizer.encode(tenth)) for _ in range(2))
    large = seconds(lambda: tokenizer.encode(text))
    assert large < 50 * max(small, 0.01)  # measured: 8 to 28 times; a quadratic way takes 100 times as long


@pytest.mark.parametrize("directory", ["tiktoken"], indirect=True)
@pytest.mark.parametrize("run", [" " * 24_990 + "a", "b" * 24_990 + " ", "\u0301" * 24_990 + "\n", "!" + "\n" * 24_990])
def test_runs_just_short_of_a_limit_take_no_longer(directory: Path, run: str) -> None:
    tokenizer = Tokenizer.from_pretrained(directory)
    plain = seconds(lambda: tokenizer.encode(MIXED))
    assert seconds(lambda: tokenizer.encode(run * 40)) < 10 * max(plain, 0.1)  # measured: 2 times at most


@pytest.mark.parametrize("content", [MIXED, "<|im_<|im_end|>end|>" * 50_000])
def test_a_chat_with_a_million_characters(directory: Path, content: str) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] | trim + '[end]' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.from_pretrained(directory)
    ids: list[int] = []
    message = {"role": "user", "content": content}
    assert seconds(lambda: ids.extend(tokenizer.apply_chat_template([message]))) < 30  # measured: 2 s at most
    assert content.strip() in tokenizer.decode(ids)


def test_messages_beyond_the_limit_are_a_request_error(
    byte_level_spec: Callable[[], dict[str, Any]], write_directory: Write
) -> None:
    path = write_directory({"tokenizer.json": byte_level_spec(), "chat_template.jinja": "{{ messages | length }}"})
    tokenizer = Tokenizer.from_pretrained(path)
    fits = chat.MAX_MESSAGES_CHARS - 100
    assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "é" * fits}])) == "1"
    with pytest.raises(RequestError, match=r"messages hold 8,000,\d+ characters as JSON, more than the 8,000,000"):
        tokenizer.apply_chat_template([{"role": "user", "content": "é" * (fits + 100)}])


def test_a_message_full_of_escapes_does_not_slow_the_search_for_a_free_character(
    byte_level_spec: Callable[[], dict[str, Any]], write_directory: Write
) -> None:
    path = write_directory({"tokenizer.json": byte_level_spec(), "chat_template.jinja": "{{ messages[0].content }}"})
    tokenizer = Tokenizer.from_pretrained(path)
    escapes = "".join(f"\\u{code:04x}" for code in range(0xE000, 0xF8FE))  # all but two

    def chatting(content: str) -> float:
        return seconds(lambda: tokenizer.apply_chat_template([{"role": "user", "content": content}]))

    plain = chatting("a" * 2 * MILLION)
    assert chatting("a" * 2 * MILLION + escapes) < 5 * max(plain, 0.1)  # looked up one by one: 16 s
