"""What is typed: lines that belong together, the editor, its history."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.chat_terminal import ALT_ENTER, CTRL_D, CTRL_J, ENTER, TAB, UP, piped, terminals


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    with terminals(tmp_path) as open_one:
        yield open_one


def test_the_editor_takes_several_lines(terminal: Any) -> None:
    pytest.importorskip("prompt_toolkit")
    one = terminal()
    one.type(f"a{CTRL_J}  b{ALT_ENTER}\x1b[200~pasted\r\n\tlines\n\x1b[201~c")
    assert r"'a\n  b\npasted\n\tlines\nc'" in one.say("")


def test_the_editor_gives_back_what_was_taken_back(terminal: Any) -> None:
    pytest.importorskip("prompt_toolkit")
    one = terminal()
    one.say("hello")
    one.type("/un" + TAB + ENTER)
    one.until("Removed: hello")  # Tab shows the prompt again: the next one is the one after this
    one.until(">>>")
    assert "[1 0.0 None user 'hello!']" in one.say("!")
    one.type("too long" + ENTER)
    one.until("error: ")
    one.until(">>>")
    assert "[3 0.0 None user 'too long?']" in one.say("?")


def test_the_history_lasts_and_is_private(terminal: Any, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    old = os.umask(0)
    try:
        terminal().say("remember me")
    finally:
        os.umask(old)
    file = tmp_path / "llama_mini" / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert "'remember me'" in terminal().say(UP)
    nowhere = tmp_path / "file"
    nowhere.touch()
    one = terminal(XDG_STATE_HOME=str(nowhere))
    one.type("/help" + ENTER)
    one.until("The history is not kept: ")


def test_plain_lines_that_belong_together(terminal: Any) -> None:
    one = terminal("--no-editor")
    one.type("a\\\r")
    one.until("... ")
    assert r"'a\nb'" in one.say("b")
    one.type('"""\r')
    one.until("... ")
    one.type("  c\\\r")
    one.until("... ")
    assert r"'  c\\'" in one.say('"""')
    assert "'d'" in one.say('"""d"""')
    one.type('"""\r')
    one.until("... ")
    one.type(CTRL_D)
    one.until("error: standard input ended inside")
    one.until(">>>")


def test_a_line_that_the_terminal_cut_is_not_answered(terminal: Any) -> None:
    one = terminal("--no-editor", stdout=subprocess.PIPE)  # without readline, as standard output is no terminal
    one.type("x" * 5000 + ENTER)
    one.until("error: a terminal cuts lines after 4,095 bytes")
    one.until(">>>")
    one.type("y" * 4000 + ENTER)
    one.until(">>>")
    assert one.child.stdout.readline().count(b"y") == 4000
    one.child.stdout.close()


def test_piped_lines_are_turns() -> None:
    done = piped('hello\r\n\n"""\ntwo\nlines\n"""\n/stats\na\\\nb\nlines\nlast', "--system")
    answers = ["[2 0.0 None system 'hello']", r"[4 0.0 None system 'two\nlines']", r"[6 0.0 None system 'a\nb']"]
    assert done.stdout.splitlines() == [*answers, "one", "two", "[10 0.0 None system 'last']"]
    assert done.stdout.endswith("]\n")
    assert done.stderr == (
        "first token 0.25 s · prefill 1 of 5 tokens, 8.0 tok/s · decode 7 tokens, 30.0 tok/s\ncontext 5 of 100 tokens\n"
    )
    assert done.returncode == 0
    assert piped("").stdout == piped("").stderr == ""
