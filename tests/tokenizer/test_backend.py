"""Added tokens: which a user's message never becomes, where a text holds them; and a native library's panic."""

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.backend import is_control, native_failures_as


@pytest.mark.parametrize(
    "content", ["<think>", "</think>", "<|im_end|>", "<｜User｜>", "[INST]", "▁<PRE>", "\ue000", "<unused 7>"]
)
def test_a_marker_is_control_though_not_marked_special(content: str) -> None:
    assert is_control(content, special=False)


@pytest.mark.parametrize("content", ["  ", "\n\n", "\t", "õ", "÷", "covid", "हिन्दी", "▁word", "▁▁", "two words", "123"])
def test_spaces_words_and_single_characters_are_text(content: str) -> None:
    assert not is_control(content, special=False)
    assert is_control(content, special=True)


def test_a_panic_becomes_an_error_and_an_interrupt_stays_one() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(TokenizerError, match="reading x failed: boom"), native_failures_as(TokenizerError, "reading x"):
        raise panic("boom")
    with pytest.raises(KeyboardInterrupt), native_failures_as(TokenizerError, "reading x"):
        raise KeyboardInterrupt


WORDS = ["<|START_GENES|>", "[C]", "\\frac", "<think>", "[C][C]", "<é>", "a b", "$x"]


@pytest.mark.parametrize("kind", ["byte_level_spec", "llama_2_spec"])
def test_added_words_are_found_as_by_the_tokenizers_library(
    request: pytest.FixtureRequest, write_directory: Callable[..., Path], kind: str
) -> None:
    """With every mixture of the rules for finding them, and after a normalizer too."""
    draw = random.Random(0)
    make_spec = request.getfixturevalue(kind)
    found: set[int] = set()
    for _ in range(6):
        spec = make_spec()
        first = max([*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]) + 1
        for id, content in enumerate(draw.sample(WORDS, 5), start=first):
            rules = {rule: draw.random() < 0.4 for rule in ("single_word", "lstrip", "rstrip", "normalized")}
            spec["added_tokens"].append({"id": id, "content": content, "special": False} | rules)
        if kind == "byte_level_spec":
            spec["normalizer"] = draw.choice([None, {"type": "NFC"}, {"type": "Lowercase"}])
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        ours = Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))
        for _ in range(150):
            text = "".join(draw.choices([*WORDS, " ", "  ", "\n", "a", "X", "é", "e\u0301", "<", "[C", "日"], k=8))
            ids = ours.encode(text)
            assert ids == library.encode(text).ids, (text, spec["added_tokens"])
            found.update(id - first for id in ids if id >= first)
    assert found == set(range(5))


def test_many_words_are_found_in_linear_time(
    byte_level_spec: Callable[[], dict[str, Any]], write_directory: Callable[..., Path]
) -> None:
    spec = byte_level_spec()
    rules = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": False}
    spec["added_tokens"] += [rules | {"id": 600 + i, "content": f"<{i}>"} for i in range(300)]
    tokenizer = Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))
    started = time.process_time()
    assert tokenizer.encode("<7> <8>  " * 5_000) == [607, 608] * 5_000
    assert tokenizer.encode(" " * 50_000, parse_special=True)
    assert time.process_time() - started < 20  # measured: 0.1 s


def test_other_threads_run_while_a_long_text_is_encoded(byte_level_spec: Callable, tmp_path: Path) -> None:
    """A server answers others meanwhile."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level_spec()))
    tokenizer, text, ends = Tokenizer.from_pretrained(tmp_path), "a" * 500_000, list[float]()
    expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    thread = threading.Thread(target=lambda: ends.append(tokenizer.encode(text) == expected))
    thread.start()
    longest, last = 0.0, (started := time.monotonic())
    while thread.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, (now := time.monotonic()) - last), now
    assert ends == [True]
    assert longest < (last - started) / 2
