"""Messages hold names and values from untrusted files: whatever those are, a message is one line of bounded length."""

import warnings
from pathlib import Path

import pytest

from llama_mini.errors import CheckpointFormatError, LlamaMiniError, LlamaMiniWarning
from llama_mini.tokenizer.config_files import read_config_files


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


def test_a_warning_names_the_line_outside_the_package(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(LlamaMiniWarning, match="no generation_config") as caught:
        read_config_files(tmp_path)
    assert caught[0].filename == __file__
