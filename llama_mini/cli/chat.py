"""A chat at the terminal: python -m llama_mini.generate --interactive

The model's text goes to standard output, all else to standard error.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from llama_mini.cli.conversation import Conversation, Show, Stopped, Turn, scalar_settings
from llama_mini.cli.line_editor import Reader, open_reader
from llama_mini.engine.sampling import SamplingParams
from llama_mini.errors import CapacityError, LlamaMiniError, RequestError
from llama_mini.validate import short_repr

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.engine.request import Stats

COMMANDS = {
    "/help": "this list",
    "/system [TEXT]": 'shows or changes the system message; "" removes it',
    "/clear": "forgets the chat; system message and settings stay",
    "/undo": "takes back the last question, to be edited, and its answer",
    "/retry": "another draw of the last answer, if temperature is above 0",
    "/set [NAME VALUE]": "shows the settings or changes one, to none for no value",
    "/stats": "times of the last answer, and how full the context is",
    "/exit": "leaves, as /quit and Ctrl-D do",
}
KEYS = "Ctrl-C stops an answer, and what came of it stays.\nA space in front sends a text that begins with a slash."
LEAVING = ("/exit", "/quit")
# What a terminal would obey, as text that shows it; 0x80 to 0x9f are escape codes of one character.
ESCAPED = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def run(llm: "LLM", params: SamplingParams, system: str | None = None) -> None:
    """Chats until the end of standard input, or until its user leaves.

    Raises TokenizerError if the checkpoint cannot chat. With nobody at a terminal the first error is raised, and
    Ctrl-C is a KeyboardInterrupt; else both are answered, and the chat goes on.
    """
    names = [usage.split()[0] for usage in COMMANDS]
    completions = [*names, *LEAVING, *(f"/set {name}" for name in scalar_settings())]
    conversation = Conversation(llm, params, system)
    Chat(conversation, open_reader(dict.fromkeys(completions))).run()


class Chat:
    """The loop: reads a text, obeys it if it is a command, else shows the answer to it."""

    def __init__(self, conversation: Conversation, reader: Reader) -> None:
        self._conversation = conversation
        self._reader = reader
        self._attended = sys.stdin.isatty()
        self._escapes = sys.stdout.isatty()
        self._draft = ""  # what stands in the editor next
        self._line_open = False

    def run(self) -> None:
        if self._attended:
            note("/help lists the commands, Ctrl-D leaves.")
        asked_to_leave = False
        while True:
            try:
                text = self._reader.read(self._draft)
                self._draft, asked_to_leave = "", False
                if text.startswith(LEAVING) and text.split()[0] in LEAVING:
                    return
                self._take(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._attended:
                    raise
                if asked_to_leave:
                    return
                self._draft, asked_to_leave = "", True
                note("Ctrl-C once more leaves, and so does Ctrl-D.")
            except LlamaMiniError as error:
                if not self._attended:
                    raise
                print(f"error: {error}", file=sys.stderr)

    def _take(self, text: str) -> None:
        if text.startswith("/"):
            self._obey(text)
        elif text.strip():
            question = text[1:] if text.startswith(" /") else text
            self._answer(lambda show, stopped: self._conversation.ask(question, show, stopped), text)

    def _obey(self, text: str) -> None:
        name, value = (*text.split(maxsplit=1), "")[:2]
        match name:
            case "/help":
                self._help()
            case "/system":
                self._system(value)
            case "/clear":
                self._conversation.clear()
                note("The chat is empty.")
            case "/undo":
                self._draft = self._conversation.undo()
                note(f"Taken back: {self._draft}")
            case "/retry":
                self._answer(self._conversation.retry, "")
            case "/set":
                self._set(value)
            case "/stats":
                self._stats()
            case _:
                raise RequestError(
                    f"{short_repr(name)} is no command; /help lists them, and a space in front sends the text as it is"
                )

    def _answer(self, answer: Callable[[Show, Stopped], Turn | None], question: str) -> None:
        try:
            with stop_by_ctrl_c(self._attended) as stopped:
                turn = answer(self._show, stopped)
        except LlamaMiniError as error:
            self._draft = question
            self._end_line()
            if not isinstance(error, RequestError | CapacityError) or not self._conversation.turns:
                raise
            raise type(error)(f"{error}; the chat is as it was, and /undo or /clear makes room") from None
        self._end_line()
        if turn is None:
            self._draft = question
            note("Stopped before anything came: nothing was kept of this turn.")
        elif turn.finish_reason == "abort":
            note("Stopped. What came of the answer stays in the chat.")
        elif turn.finish_reason == "length":
            note(f"Stopped at its longest, {turn.n_tokens} tokens: by max_tokens or by the context's end.")
        elif not turn.answer:
            note("The answer is empty.")
        if self._attended:
            print(file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        sys.stdout.write(text.translate(ESCAPED) if self._escapes else text)
        sys.stdout.flush()
        self._line_open = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._line_open:
            self._show("\n")

    def _help(self) -> None:
        lines = [f"{usage:{max(map(len, COMMANDS))}}  {meaning}" for usage, meaning in COMMANDS.items()]
        note("\n".join([*lines, KEYS, self._reader.help]))

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == '""' else text
        system = self._conversation.system
        note("No system message; the chat template may have its own." if system is None else f"System: {system}")

    def _set(self, text: str) -> None:
        if text:
            name, value = (*text.split(maxsplit=1), "")[:2]
            if not value:
                raise RequestError(f"/set {name} lacks a value: give a name and a value, or neither to see all")
            self._conversation.set(name, value.strip())
            note(f"{name}  {self._conversation.settings()[name]}")
            return
        settings = self._conversation.settings()
        note("\n".join(f"{name:{max(map(len, settings))}}  {value}" for name, value in settings.items()))

    def _stats(self) -> None:
        if self._conversation.turns:
            turn = self._conversation.turns[-1]
            note(f"stopped after {turn.n_tokens} tokens" if turn.stats is None else summary(turn.stats))
        note(f"context {self._conversation.context_tokens} of {self._conversation.max_context} tokens")


def summary(stats: "Stats") -> str:
    first = "–" if stats.ttft_seconds is None else f"{stats.ttft_seconds:.2f} s"
    rate = "–" if stats.decode_tok_s is None else f"{stats.decode_tok_s:.1f} tok/s"
    reused = stats.cached_tokens
    return (
        f"first token {first} · prompt {stats.prompt_tokens} tokens, {reused} reused · "
        f"decode {stats.new_tokens} tokens, {rate}"
    )


@contextmanager
def stop_by_ctrl_c(attended: bool) -> Iterator[Stopped]:
    """Whether Ctrl-C was pressed; a second time it is a KeyboardInterrupt, for a step that takes too long.

    An exception at any point could leave the model's cache half written, so the first time is only a flag.
    """
    pressed = False

    def press(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if not attended:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def note(text: str) -> None:
    """A line to the user, dim where that can be seen; nothing in it reaches the terminal raw."""
    text = text.translate(ESCAPED)
    print(f"\x1b[2m{text}\x1b[0m" if in_colour(sys.stderr) else text, file=sys.stderr, flush=True)


def in_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
