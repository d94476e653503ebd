"""What the command lines share: errors as one sentence and an exit code, and text from standard input."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from llama_mini.errors import LlamaMiniError, RequestError

INTERRUPTED = 130


def exit_code_of(run: Callable[[], None]) -> int:
    """Runs a command and returns its exit code: 0, 2 usage, 3 checkpoint, 4 capacity, 1 other, 130 Ctrl-C."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        run()
    except LlamaMiniError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader left early: nothing more to say, to it or about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def read_standard_input(what: str) -> str:
    """All of standard input, which a person at a terminal is asked for. Raises RequestError if it is not UTF-8."""
    if sys.stdin.isatty():
        print(f"Type {what}; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    return as_text(sys.stdin.buffer.read(), "standard input")


def as_text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def checkpoint_of(model: str | None) -> str | Path:
    """What --model names, or the default checkpoint, fetched the first time."""
    if model is not None:
        return model
    from llama_mini.cli.default_model import ensure_default_checkpoint

    return ensure_default_checkpoint()
