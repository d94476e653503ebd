"""The chat at a terminal, as a person types to it; and with pipes in place of the terminal."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_mini.cli.chat import COMMANDS, ESCAPED
from tests.cli.chat_terminal import CODE, CTRL_C, CTRL_D, CTRL_L, ENTER, SECONDS, Terminal, piped, terminals
from tests.processes import child


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    with terminals(tmp_path) as open_one:
        yield open_one


@pytest.fixture(params=[(), ("--no-editor",)], ids=["editor", "lines"])
def either(request: pytest.FixtureRequest, terminal: Any) -> Terminal:
    """Both ways of typing."""
    if not request.param:
        pytest.importorskip("prompt_toolkit")
    return terminal(*request.param)


def test_a_chat_with_every_command(either: Terminal) -> None:
    assert "[1 0.0 None user 'hello']" in either.say("hello")
    assert "[3 0.0 None user 'more']" in either.say("more")
    either.type("/system Be loud." + ENTER)
    either.until("System: Be loud.")
    either.until(">>>")
    assert "[6 0.0 None system 'again']" in either.say("again")
    either.type("/set temperature 0.5" + ENTER)
    either.until("temperature  0.5")
    either.until(">>>")
    either.type("/set seed=3" + ENTER)
    either.until("seed  3")
    either.until(">>>")
    assert "[6 0.5 4 system 'again']" in either.say("/retry")
    either.type("/stats" + ENTER)
    either.until("first token 0.25 s · prefill 1 of 5 tokens, 8.0 tok/s")
    either.until("context 7 of 100 tokens")
    either.until(">>>")
    either.type("/clear" + ENTER)
    either.until("The chat is empty.")
    either.until(">>>")
    assert "[2 0.5 3 system 'first']" in either.say("first")
    either.type("/quit" + ENTER)
    assert either.ended() == 0


def test_help_names_every_command_and_fits_eighty_columns(either: Terminal) -> None:
    either.type("/help" + ENTER)
    shown = either.until("Several lines: ")
    for usage, meaning in COMMANDS.items():
        assert usage in shown
        assert meaning in shown
        assert len(meaning) + 2 + max(map(len, COMMANDS)) < 80
    either.until(">>>")
    for command in ("/set", "/system", "/undo", "/retry", "/clear", "/stats"):
        either.type(command + ENTER)
        assert "not a command" not in either.until("\r\n") + either.until(">>>")


def test_a_slash_is_a_command_unless_a_space_stands_in_front_and_ctrl_d_leaves(either: Terminal) -> None:
    either.type("/etc/passwd is what?" + ENTER)
    either.until("error: '/etc/passwd' is not a command; ")
    either.until(">>>")
    assert "[1 0.0 None user '/exit is what?']" in either.say(" /exit is what?")
    either.type(CTRL_L)
    either.until("\x1b[2J")  # the editor reads again: before that a terminal drops a Ctrl-D
    either.type(CTRL_D)
    assert either.ended() == 0


def test_ctrl_c_ends_an_answer_and_keeps_what_came(either: Terminal) -> None:
    either.type("silent" + ENTER)  # a second Ctrl-C does not wait for the first token
    either.until("working")
    either.type(CTRL_C)
    either.until("pressed")
    either.type(CTRL_C)
    either.until("the chat is as before")
    either.until(">>>")
    either.press_ctrl_c()  # the editor holds the question again
    either.until(">>>")
    either.type("endless" + ENTER)
    either.until("word word ")
    either.type(CTRL_C)
    either.until("Stopped. The text so far stays in the chat.")
    either.until(">>>")
    assert "[3 " in either.say("more")
    either.type("/undo" + ENTER)
    either.until("Removed: more")


def test_ctrl_c_twice_or_ctrl_d_leaves(either: Terminal) -> None:
    either.press_ctrl_c()
    either.until("Press Ctrl-C again")
    either.until(">>>")
    either.type("typed" + CTRL_L)
    either.until("\x1b[2J")  # the editor has read the line: the echo of the terminal itself would not say so
    either.until("typed")
    either.press_ctrl_c()  # drops the line, and does not count
    either.until(">>>")
    either.press_ctrl_c()
    either.until("Press Ctrl-C again")
    either.until(">>>")
    either.type(CTRL_L)
    either.until("\x1b[2J")
    either.press_ctrl_c()
    assert either.ended() == 0


def test_no_control_character_of_the_model_reaches_the_terminal(either: Terminal) -> None:
    either.type("escape" + ENTER)
    shown = either.until("back 日本 👩\u200d👧\tx")
    assert r"\x1b]0;owned\x07\x1b[31mred\u009b1m\rback" in shown
    assert "\x1b]0;" not in shown
    assert set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) == set(map(chr, ESCAPED))


def test_endings_are_told(either: Terminal) -> None:
    either.type("cut" + ENTER)
    either.until("Stopped after ")
    either.until(">>>")
    either.type("blank" + ENTER)
    either.until("The answer is empty.")
    either.until(">>>")
    either.type("too long" + ENTER)
    either.until("error: 90 prompt tokens and 20 new ones exceed the context of 100; the chat is as before, and /undo")
    either.until(">>>")
    either.press_ctrl_c()  # the editor holds the question again
    either.until(">>>")
    assert "[5 " in either.say("more")


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["colour", "NO_COLOR", "dumb"])
def test_notes_are_dim_where_colour_is_wanted(terminal: Any, env: dict[str, str]) -> None:
    one = terminal("--no-editor", **env)
    assert ("\x1b[2m" in one.screen) is (env == {})


def test_answers_alone_on_standard_output(terminal: Any) -> None:
    reading, writing = os.pipe()
    one = terminal(stdout=writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        one.type("escape" + ENTER)
        assert pipe.readline().decode() == "\x1b]0;owned\x07\x1b[31mred\x9b1m\rback 日本 👩\u200d👧\tx\n"
        one.type(CTRL_L)
        one.until("\x1b[2J")  # the editor reads again: before that a terminal drops a Ctrl-D
        one.type(CTRL_D)
        assert one.ended() == 0
        assert pipe.read() == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hi\n/nonsense\nmore\n", "'/nonsense' is not a command"),
        ("hi\ntoo long\nmore\n", "exceed the context of 100"),
        ("hi\n/set top_p 2\nmore\n", "top_p must be a finite number from 0 to 1, not 2"),
        ('hi\n"""\nmore\n', "standard input ended inside a text of several lines"),
        (b"hi\n\xff\nmore\n", "a line of standard input is not UTF-8 text"),
    ],
    ids=["command", "context", "setting", "block", "bytes"],
)
def test_the_first_error_ends_what_is_piped(text: str | bytes, message: str) -> None:
    done = piped(text)
    assert done.stdout == "[1 0.0 None user 'hi']\n"
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2


def test_ctrl_c_ends_what_is_piped() -> None:
    with child(sys.executable, "-c", CODE, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"endless\n")
        process.stdin.flush()
        assert process.stdout.read(10) == b"word word "
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
        assert process.returncode == 130
