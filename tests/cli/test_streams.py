"""The standard streams: every encoding, a terminal, a full disk, closed ones, and what is read as text."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama_mini import Tokenizer
from llama_mini.__main__ import main
from llama_mini.cli.common import exit_code_of
from llama_mini.cli.streams import LINE_OF_A_TERMINAL, read_standard_input, typed_text
from llama_mini.errors import RequestError
from llama_mini.validate import as_text

pty = pytest.importorskip("pty", reason="needs a Unix terminal")

TEXT = "é \ufffd 한 \U0001f600 \x9b"
ENCODINGS = ["cp1252", "latin-1", "ascii", "cp437", "utf-16", "utf-8"]
# A process that prints as every command does, and a message before it.
CODE = """
import sys
from llama_mini.cli.common import exit_code_of
def run():
    print("a message", file=sys.stderr)
    print("an answer" + sys.stdin.read())
sys.exit(exit_code_of(run))
"""


@contextmanager
def standard_output(to: object, **options: object) -> Iterator[None]:
    with open(to, "w", **options) as stream, pytest.MonkeyPatch.context() as patch:  # type: ignore[call-overload]
        patch.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_the_encoding_lacks_is_a_json_escape(tmp_path: Path, encoding: str) -> None:
    with standard_output(tmp_path / "out", encoding=encoding):
        assert exit_code_of(lambda: print(json.dumps({"text": TEXT}, ensure_ascii=False))) == 0
        assert exit_code_of(lambda: print(TEXT)) == 0
    first, second = (tmp_path / "out").read_text(encoding=encoding).splitlines()
    assert json.loads(first) == {"text": TEXT}
    assert json.loads(f'"{second}"') == TEXT
    assert second.startswith("é" if encoding != "ascii" else r"\u00e9")


def test_a_chosen_replacement_is_kept(tmp_path: Path) -> None:
    with standard_output(tmp_path / "out", encoding="ascii", errors="replace"):
        assert exit_code_of(lambda: print("é")) == 0
    assert (tmp_path / "out").read_bytes() == b"?\n"


def commands(tiny_dir: Path, tmp_path: Path) -> list[list[object]]:
    (tmp_path / "text").write_text("some words to score", encoding="utf-8")
    model = ["--model", tiny_dir]
    half = Tokenizer.from_pretrained(tiny_dir).encode("é", False)[0]  # of a character: U+FFFD, which few encodings have
    answer = ["generate", *model, "--kernels", "off", "--max-tokens", 2, "--logit-bias", f"{half}=1e6", "hello"]
    score = ["score", *model, "--kernels", "off", "--against-dtype", "float64", tmp_path / "text"]
    lab = [["lab", "norms", *model], ["lab", "tour", *model, "--lang", "ko"]]
    convert = ["convert", tiny_dir, tmp_path / "new"]
    return [answer, [*answer, "--json"], score, ["info", tiny_dir], *lab, convert, ["--help"], ["generate", "--help"]]


def test_every_command_in_ascii(tiny_dir: Path, tmp_path: Path) -> None:
    for command in commands(tiny_dir, tmp_path):
        with standard_output(tmp_path / "out", encoding="ascii"):
            assert ended([*map(str, command)]) == 0, command
        assert (tmp_path / "out").read_text(encoding="ascii"), command


def test_every_command_on_a_full_disk(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(tiny_dir, tmp_path):
        for line_buffering in (True, False):  # the failure shows at the first line, or at the end
            if command[0] == "convert" and line_buffering:
                continue  # its target is there already
            with pytest.MonkeyPatch.context() as patch, open("/dev/full", "wb") as full:
                patch.setattr(sys, "stdout", io.TextIOWrapper(full, "utf-8", line_buffering=line_buffering))
                assert ended([*map(str, command)]) == 1, command
            said = capsys.readouterr().err
            assert said == "error: standard output: No space left on device\n", command


def ended(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:  # from argparse
        return end.code if isinstance(end.code, int) else 1


@pytest.mark.parametrize(
    ("streams", "code", "out", "err"),
    [
        ("<&-", 0, "an answer\n", "a message\n"),
        (">&-", 1, "", "a message\nerror: standard output: Bad file descriptor\n"),
        (">/dev/full", 1, "", "a message\nerror: standard output: No space left on device\n"),
        ("2>&-", 0, "an answer\n", ""),
        ("2>/dev/full", 0, "an answer\n", ""),
        (">/dev/full 2>/dev/full", 1, "", ""),
        ("<&- >&- 2>&-", 1, "", ""),
    ],
)
def test_closed_and_full_streams(streams: str, code: int, out: str, err: str) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, CODE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_a_process_without_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As pythonw starts it: what writes no answer works."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    seen: list[str] = []
    assert exit_code_of(lambda: seen.append(sys.stdin.read())) == 0
    assert exit_code_of(lambda: print("lost")) == 1
    assert (seen, sys.stdin, sys.stdout, sys.stderr) == ([""], None, None, None)


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Standard output is a terminal; the function returns what it shows."""
    screen, side = pty.openpty()

    def shown() -> str:
        os.write(side, b"END")
        data = b""
        while not data.endswith(b"END"):  # it comes in pieces
            data += os.read(screen, 1 << 16)
        return data.removesuffix(b"END").decode()

    with open(side, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield shown
    os.close(screen)


def test_a_terminal_gets_no_escape_codes(tiny_dir: Path, tmp_path: Path) -> None:
    escape = Tokenizer.from_pretrained(tiny_dir).encode("\x1b", False)[0]
    base = ["generate", "--model", str(tiny_dir), "--kernels", "off", "--max-tokens", "2"]
    answer = [*base, "--logit-bias", f"{escape}=1e6", "hello"]
    (tmp_path / "a\x1b[2Jb").write_text("some words")
    with terminal() as shown:
        assert exit_code_of(lambda: print("\x1b]0;owned\x07\x9b1m\x7f\r 한\tx")) == 0
        assert shown() == "\\x1b]0;owned\\x07\\u009b1m\\u007f\\r 한\tx\r\n"
        for words in (answer, [*answer, "--no-stream"], [*answer, "--json"]):
            assert main(words) == 0
            text = shown()
            assert "\x1b" not in text
            assert r"\x1b\x1b" in text or r"\u001b\u001b" in text
        assert main(["score", str(tmp_path / "a\x1b[2Jb"), "--model", str(tiny_dir), "--kernels", "off"]) == 0
        assert r"a\x1b[2Jb" in shown()
    with standard_output(tmp_path / "out", encoding="utf-8"):
        assert main(answer) == 0
    assert (tmp_path / "out").read_bytes() == b"\x1b\x1b\n"


def test_a_byte_order_mark_is_no_text() -> None:
    assert as_text(b"\xef\xbb\xbfhello", "a file", RequestError) == as_text(b"hello", "a file", RequestError) == "hello"
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        data = "\ufeffhello".encode(encoding) if encoding.endswith("be") else "hello".encode(encoding)
        with pytest.raises(RequestError, match="a file is UTF-16 or UTF-32 text: save it as UTF-8"):
            as_text(data, "a file", RequestError)


def test_bytes_on_the_command_line_that_are_no_text() -> None:
    assert typed_text("é한", "PROMPT") == "é한"
    assert typed_text("é한".encode().decode("ascii", "surrogateescape"), "PROMPT") == "é한"  # as in the locale C
    with pytest.raises(RequestError, match="PROMPT is not UTF-8 text: invalid start byte at byte 1"):
        typed_text("a\udcff", "PROMPT")
    with pytest.raises(RequestError, match="PROMPT holds half of a character"):
        typed_text("a\ud83d", "PROMPT")


@pytest.mark.parametrize("length", [LINE_OF_A_TERMINAL - 1, LINE_OF_A_TERMINAL, 2 * LINE_OF_A_TERMINAL])
def test_a_line_that_the_terminal_cut_is_refused(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    keys, side = pty.openpty()
    os.write(keys, b"first\n" + b"x" * length + b"\n\x04")
    with open(side, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        if length < LINE_OF_A_TERMINAL:
            assert read_standard_input("the prompt") == "first\n" + "x" * length + "\n"
        else:
            with pytest.raises(RequestError, match="a terminal cuts lines after 4,095 bytes"):
                read_standard_input("the prompt")
    os.close(keys)
