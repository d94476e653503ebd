"""What the commands share: exit codes, the default checkpoint, tables and statistics."""

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llama_mini.cli.streams import standard_streams
from llama_mini.errors import LlamaMiniError

if TYPE_CHECKING:
    from llama_mini.engine.request import Stats

INTERRUPTED = 130


def exit_code_of(run: Callable[[], object]) -> int:
    """Runs a command and returns its exit code: 0, 2 usage, 3 checkpoint, 4 capacity, 1 other, 130 Ctrl-C.

    `run` parses the options too, so that --help has the same streams.
    """
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    with standard_streams():
        try:
            try:
                run()
            finally:
                sys.stdout.flush()  # a full disk shows here, not when the interpreter ends and nobody can tell
        except LlamaMiniError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # as in `... | head`: no message
            return 0
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            print(f"error: {LlamaMiniError(reason)}", file=sys.stderr)
            return LlamaMiniError.exit_code
    return 0


def checkpoint_of(model: str | None) -> str | Path:
    """What --model names, or the default checkpoint, which is downloaded the first time."""
    if model is not None:
        return model
    from llama_mini.cli.default_model import ensure_default_checkpoint

    return ensure_default_checkpoint()


def table(rows: Mapping[str, str]) -> str:
    """A line for each row: its name, padded to the longest, and its value."""
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def summary(stats: "Stats") -> str:
    """The times of one answer. `prefill 21 of 65 tokens`: the others were in the cache."""
    prefilled = stats.prompt_tokens - stats.cached_tokens
    prompt = f"{prefilled} of {stats.prompt_tokens}" if stats.cached_tokens else f"{prefilled}"
    return (
        f"first token {_or_dash(stats.ttft_seconds, '.2f', 's')} · "
        f"prefill {prompt} tokens, {_or_dash(stats.prefill_tok_s, '.1f', 'tok/s')} · "
        f"decode {stats.new_tokens} tokens, {_or_dash(stats.decode_tok_s, '.1f', 'tok/s')}"
    )


def _or_dash(value: float | None, digits: str, unit: str) -> str:
    return "–" if value is None else f"{value:{digits}} {unit}"
