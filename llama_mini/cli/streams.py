"""The standard streams of every command: what may be written to them and what may be read, whatever they are."""

import codecs
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from llama_mini.errors import RequestError
from llama_mini.validate import as_text, short_repr

# Control characters, which a terminal would obey, in a visible form. JSON may hold those from 0x7f on as they are, so
# theirs is a form that JSON reads back; 0x80 to 0x9f are escape codes of one character.
ESCAPED = {code: repr(chr(code))[1:-1] for code in range(32) if chr(code) not in "\n\t"}
ESCAPED |= {code: f"\\u{code:04x}" for code in range(127, 160)}
LINE_OF_A_TERMINAL = 4095  # bytes of a line, without its end, that Linux keeps; it drops what is typed beyond
_ESCAPE = "llama_mini.escape"


@contextmanager
def standard_streams() -> Iterator[None]:
    """Makes the standard streams safe to use for a command.

    Output: characters that the encoding lacks are written as JSON escapes; a terminal gets control characters in a
    visible form; a full disk, a closed stream or a reader that has left is an OSError that names standard output.
    Messages: those that cannot be written are dropped, since an answer must not fail because of them.
    Input: a closed one is empty.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    codecs.register_error(_ESCAPE, _as_json_escapes)
    with ExitStack() as stack:  # a stream that was closed from the start is None
        if sys.stdin is None:
            sys.stdin = stack.enter_context(open(os.devnull, encoding="utf-8"))
        if sys.stdout is None:
            unwritable = os.open(os.devnull, os.O_RDONLY)
            sys.stdout = stack.enter_context(open(unwritable, "w", encoding="utf-8"))
        if sys.stderr is None:
            sys.stderr = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        sys.stdout, sys.stderr = _wrapped(sys.stdout, True), _wrapped(sys.stderr, False)
        try:
            yield
        finally:
            sys.stderr.flush()
            sys.stdin, sys.stdout, sys.stderr = before


def read_standard_input(what: str) -> str:
    """All of standard input; at a terminal the user is asked for `what`. Raises RequestError if it is not UTF-8."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"Type {what}; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(f"standard input cannot be read: {error.strerror}") from None
    for line in data.split(b"\n") if terminal else ():
        check_whole_line(line)
    return as_text(data, "standard input", RequestError)


def read_file(name: str) -> str:
    """All of a file, a pipe, or standard input for `-`. Raises RequestError if it cannot be read as UTF-8."""
    if name == "-":
        return read_standard_input("the text")
    try:
        with open(name, "rb") as file:
            return as_text(file.read(), name, RequestError)
    except OSError as error:
        raise RequestError(f"cannot read {name}: {error.strerror}") from None


def typed_text(text: str, name: str) -> str:
    """A text as Python got it from the command line or a terminal, where each byte it cannot read is a surrogate."""
    if not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    try:
        return as_text(text.encode(sys.getfilesystemencoding(), "surrogateescape"), name, RequestError)
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds half of a character, {short_repr(text)}: it cannot be written") from None


def check_whole_line(line: bytes) -> None:
    """Refuses a line typed at a terminal, without its end, that the terminal may have cut. Raises RequestError."""
    if len(line) >= LINE_OF_A_TERMINAL:
        raise RequestError(f"a terminal cuts lines after {LINE_OF_A_TERMINAL:,} bytes: type shorter ones or use a file")


class _Stream(io.TextIOWrapper):
    """Writes to the buffer of another stream, which stays open when this one goes.

    After a failure nothing more is written. Of standard output it is then an OSError each time: argparse ignores what
    goes wrong, and the last flush shall tell. A message that cannot be written is dropped.
    """

    def __init__(self, stream: io.TextIOWrapper, is_output: bool) -> None:
        chosen = stream.errors not in ("strict", "surrogateescape")  # by PYTHONIOENCODING
        super().__init__(
            stream.buffer,
            stream.encoding,
            stream.errors if chosen else _ESCAPE,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._stream = stream  # without a reference to it, Python would close it and its buffer
        self._is_output = is_output
        self._escapes = is_output and stream.isatty()
        self._failure: tuple[int | None, str] | None = None  # an error itself would keep all its frames alive

    def write(self, text: str) -> int:
        with self._guarded():
            return super().write(text.translate(ESCAPED) if self._escapes else text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            super().flush()

    def close(self) -> None:
        pass

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        if self._failure is None:
            try:
                yield
                return
            except OSError as error:
                self._failure = error.errno, str(error.strerror)
                null = os.open(os.devnull, os.O_WRONLY)  # takes what is still in the buffers
                os.dup2(null, self.fileno())
                os.close(null)
        elif not self._is_output:
            yield
        if self._is_output:
            raise OSError(*self._failure, "standard output")


def _wrapped(stream: TextIO, is_output: bool) -> TextIO:
    """The stream made safe; one that is no file, as in a notebook, stays as it is."""
    try:
        stream.fileno()
    except (OSError, AttributeError):
        return stream
    return _Stream(stream, is_output) if isinstance(stream, io.TextIOWrapper) else stream


def _as_json_escapes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
