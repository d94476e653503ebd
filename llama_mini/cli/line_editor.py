"""What the user types in a chat: one text at a time, of one or several lines."""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from llama_mini.cli.streams import check_whole_line, typed_text
from llama_mini.errors import RequestError
from llama_mini.machine import user_folder
from llama_mini.validate import as_text

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

PROMPT = ">>> "
CONTINUED = "... "
LINE = "a line of standard input"


def open_reader(completions: Iterable[str]) -> "Reader":
    """prompt-toolkit's editor if there is a terminal and it is installed, else plain lines.

    Of both, `help` says how to type several lines, and `read` gives the next text; the editor begins with a draft. It
    raises EOFError at the end of input, KeyboardInterrupt for Ctrl-C on an empty line.
    """
    if sys.stdin.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with suppress(ImportError):
            return Editor(completions)
    return Lines()


class Lines:
    """Plain lines of standard input, edited with readline at a terminal."""

    help = 'Several lines: end each but the last with a backslash, or put them between """ and """.'

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()
        self._typed: Callable[[], str] | None = None  # the line so far; None without readline
        if self._terminal and sys.stdout.isatty():
            with suppress(ImportError):
                import readline

                self._typed = readline.get_line_buffer

    def read(self, draft: str) -> str:
        try:
            return self._all_lines(self._line(PROMPT))
        except (EOFError, KeyboardInterrupt) as end:
            if self._terminal:
                print(file=sys.stderr)
            if isinstance(end, KeyboardInterrupt) and self._typed is not None and self._typed():
                return ""
            raise

    def _all_lines(self, line: str) -> str:
        """The text that begins with this line."""
        try:
            if not line.lstrip().startswith('"""'):
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + self._line(CONTINUED)
                return line
            text = line.lstrip().removeprefix('"""')
            while not text.rstrip().endswith('"""'):
                text += "\n" + self._line(CONTINUED)
            return text.rstrip().removesuffix('"""').strip("\n")
        except EOFError:
            where = 'after a backslash, or without the closing """'
            raise RequestError(f"standard input ended inside a text of several lines: {where}") from None

    def _line(self, prompt: str) -> str:
        if self._typed is not None:  # readline reads a terminal key by key, which cuts nothing
            try:
                return typed_text(input(prompt), LINE)
            except UnicodeDecodeError as error:
                raise RequestError(f"{LINE} is not {error.encoding} text: {error.reason}") from None
        if self._terminal:  # input() would write the prompt to standard output
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if self._terminal:
            check_whole_line(line)
        return as_text(line, LINE, RequestError)


class Editor:
    """prompt-toolkit: editing, a history on disk, completion with Tab. Raises ImportError without the library."""

    def __init__(self, completions: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        history, where = _history()
        self.help = f"Several lines: Alt-Enter or Ctrl-J begins a new line; pasted lines are kept.\n{where}"
        self._session: PromptSession[str] = PromptSession(
            [("bold", PROMPT)],
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=_keys(),
            completer=WordCompleter(list(completions), sentence=True),
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would keep eight lines free below the prompt
            history=history,
            output=create_output(sys.stderr),
        )

    def read(self, draft: str) -> str:
        return self._session.prompt(default=draft)


Reader = Lines | Editor


def _history() -> "tuple[History, str]":
    """The history, and a sentence about where it is kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class LenientHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):  # a full disk must not end the chat
                super().store_string(string)

    path = user_folder("XDG_STATE_HOME", ".local/state") / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError as error:
        return InMemoryHistory(), f"The history is not kept: {path} cannot be written ({error.strerror})."
    return LenientHistory(path), f"The history is in {path}, which only you can read."


def _keys() -> "KeyBindings":
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import Condition, has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # not during a search in the history

    @Condition
    def something_typed() -> bool:
        from prompt_toolkit.application import get_app

        return bool(get_app().current_buffer.text)

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=typing & something_typed)
    def _clear_line(event: KeyPressEvent) -> None:
        event.app.exit(result="", style="class:aborting")

    return keys
