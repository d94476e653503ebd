"""Which added tokens are out of reach for text, and what becomes of a native library's panic."""

import pytest

from llama_mini.errors import TokenizerError
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
