"""Messages hold names and values from untrusted files: whatever those are, a message is one line of bounded length."""

import warnings

import pytest

from llama_mini.errors import CheckpointFormatError, LlamaMiniError, LlamaMiniWarning


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\u2028", "\0", "\r", "\ud800"])
def test_what_a_terminal_would_obey_is_escaped(text: str) -> None:
    message = str(CheckpointFormatError(f"x{text}y"))
    assert message.isprintable()
    assert message[0] == "x"
    assert message[-1] == "y"
    assert message.encode()  # half a surrogate pair has no bytes
    with pytest.warns(LlamaMiniWarning) as caught:
        warnings.warn(f"x{text}y", LlamaMiniWarning, stacklevel=1)
    assert str(caught[0].message).isprintable()


def test_text_of_any_language_stays() -> None:
    assert str(LlamaMiniError("天空 é 🦙 → ½")) == "天空 é 🦙 → ½"


def test_a_long_message_is_cut_and_says_so() -> None:
    message = str(LlamaMiniError("a" * 10**6))
    assert len(message) == 1900
    assert message.endswith("a...")
    assert str(LlamaMiniError("a" * 1899)) == "a" * 1899
