"""The command `chat`: a chat at the terminal. The answers go to standard output, everything else to standard error."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from llama_mini.cli.common import summary, table
from llama_mini.cli.conversation import Conversation, Show, Stopped, Turn
from llama_mini.cli.line_editor import Reader, open_reader
from llama_mini.cli.streams import ESCAPED
from llama_mini.engine.sampling_params import SamplingParams
from llama_mini.errors import CapacityError, LlamaMiniError, RequestError
from llama_mini.validate import short_repr

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM

COMMANDS = {
    "/help": "list the commands",
    "/system [TEXT]": 'show or change the system message; "" removes it',
    "/clear": "start a new chat with the same system message and settings",
    "/undo": "remove the last question, to edit it, and its answer",
    "/retry": "answer the last question again, with another seed",
    "/set [NAME VALUE]": "show the settings or change one; VALUE none clears it",
    "/stats": "show times of the last answer, and how full the context is",
    "/exit": "leave, as /quit and Ctrl-D do",
}
KEYS = "Ctrl-C stops an answer and keeps the text so far.\nPut a space in front of a text that begins with a slash."


def run(llm: "LLM", params: SamplingParams, system: str | None = None, variables: dict[str, Any] | None = None) -> None:
    """Chats until standard input ends or the user leaves. `variables` are those of the chat template.

    At a terminal an error is a message and Ctrl-C stops an answer, after which the chat continues. Elsewhere the first
    error is raised, and Ctrl-C is a KeyboardInterrupt. Raises TokenizerError if the checkpoint cannot chat.
    """
    names = [usage.split()[0] for usage in COMMANDS]
    conversation = Conversation(llm, params, system, variables)
    completions = [*names, "/quit", *(f"/set {name}" for name in conversation.settings())]
    Chat(conversation, open_reader(completions)).run()


class Chat:
    """The loop: reads a text, and runs it if it is a command or answers it."""

    def __init__(self, conversation: Conversation, reader: Reader) -> None:
        self._conversation = conversation
        self._reader = reader
        self._interactive = sys.stdin.isatty()
        self._draft = ""  # the text to edit that the next prompt begins with
        self._in_line = False  # the answer so far does not end with a newline

    def run(self) -> None:
        if self._interactive:
            note("/help lists the commands, Ctrl-D leaves.")
        interrupted = False
        while True:
            try:
                text = self._reader.read(self._draft)
                self._draft, interrupted = "", False
                self._handle(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                if interrupted:
                    return
                self._draft, interrupted = "", True
                note("Press Ctrl-C again or Ctrl-D to leave.")
            except LlamaMiniError as error:
                if not self._interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)

    def _handle(self, text: str) -> None:
        if text.startswith("/"):
            self._run_command(text)
        elif text.strip():
            question = text[1:] if text.startswith(" /") else text
            self._answer(lambda show, stopped: self._conversation.ask(question, show, stopped), text)

    def _run_command(self, text: str) -> None:
        name, value = (*text.split(maxsplit=1), "")[:2]
        match name:
            case "/help":
                note("\n".join([table(COMMANDS), KEYS, self._reader.help]))
            case "/system":
                self._system(value)
            case "/clear":
                self._conversation.clear()
                note("The chat is empty.")
            case "/undo":
                self._draft = self._conversation.undo()
                note(f"Removed: {self._draft}")
            case "/retry":
                self._answer(self._conversation.retry, "")
            case "/set":
                self._set(value)
            case "/stats":
                self._stats()
            case "/exit" | "/quit":
                raise EOFError
            case _:
                do = "/help lists them; with a space in front it is sent as text"
                raise RequestError(f"{short_repr(name)} is not a command; {do}")

    def _answer(self, answer: Callable[[Show, Stopped], Turn | None], question: str) -> None:
        try:
            with stop_by_ctrl_c(self._interactive) as stopped:
                turn = answer(self._show, stopped)
        except LlamaMiniError as error:
            self._draft = question
            self._end_line()
            if not isinstance(error, RequestError | CapacityError) or not self._conversation.turns:
                raise
            raise type(error)(f"{error}; the chat is as before, and /undo or /clear makes it shorter") from None
        self._end_line()
        if turn is None:
            self._draft = question
            note("Stopped before there was any text: the chat is as before.")
        elif turn.finish_reason == "abort":
            note("Stopped. The text so far stays in the chat.")
        elif turn.finish_reason == "length":
            note(f"Stopped after {turn.n_tokens} tokens, by max_tokens, max_time or the end of the context.")
        elif not turn.answer:
            note("The answer is empty.")
        if self._interactive:
            print(file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        print(text, end="", flush=True)
        self._in_line = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._in_line:
            self._show("\n")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == '""' else text
        system = self._conversation.system
        note("No system message, but the chat template may have one." if system is None else f"System: {system}")

    def _set(self, text: str) -> None:
        if text:
            name, value = (*re.split(r"\s+|=", text, maxsplit=1), "")[:2]  # also NAME=VALUE
            if not value:
                raise RequestError(f"/set {name} needs a value; /set alone shows all settings")
            self._conversation.set(name, value.strip())
        settings = self._conversation.settings()
        note(table({name: settings[name]} if text else settings))

    def _stats(self) -> None:
        if self._conversation.turns:
            turn = self._conversation.turns[-1]
            note(f"stopped after {turn.n_tokens} tokens" if turn.stats is None else summary(turn.stats))
        note(f"context {self._conversation.context_tokens} of {self._conversation.max_context} tokens")


@contextmanager
def stop_by_ctrl_c(interactive: bool) -> Iterator[Stopped]:
    """Makes the first Ctrl-C a flag, since an exception at any point could leave the model's cache half written.

    The second one is a KeyboardInterrupt, for a step that takes too long.
    """
    pressed = False

    def press(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if not interactive:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def note(text: str) -> None:
    """A message to the user, dim where the terminal has colours, with its control characters escaped."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    text = text.translate(ESCAPED)
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)
