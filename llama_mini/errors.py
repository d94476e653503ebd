"""The errors that bad input raises. `exit_code` is the exit code of a command that ends with the error."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_LENGTH = 1900


class LlamaMiniError(Exception):
    """The base class. A message names the file or parameter, what was found, what was expected and what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


class ConfigError(LlamaMiniError):
    """A configuration or norm plan from which no model can be built."""

    exit_code = 3


class CheckpointError(LlamaMiniError):
    """A checkpoint that cannot be opened."""

    exit_code = 3


class CheckpointPathError(CheckpointError):
    """A path does not exist, cannot be read, or leads out of the checkpoint's directory."""


class CheckpointFormatError(CheckpointError):
    """A file is damaged, or of a format that is not supported."""


class CheckpointIncompleteError(CheckpointError):
    """Files of the checkpoint are missing."""


class CheckpointMismatchError(CheckpointError):
    """The tensors are not those that the configuration describes."""


class TokenizerError(LlamaMiniError):
    """A tokenizer or chat template that cannot be loaded or used."""

    exit_code = 3


class RequestError(LlamaMiniError):
    """A prompt, parameter or option that is not valid."""

    exit_code = 2


class ContextError(RequestError):
    """A prompt and its new tokens are longer than the model's context."""


class CapacityError(LlamaMiniError):
    """Something does not fit in memory or in the cache."""

    exit_code = 4


class NumericalError(LlamaMiniError):
    """The model produced NaN or infinity."""


@contextmanager
def errors_about(what: object) -> Iterator[None]:
    """Puts the file or the parameter that an error is about before its message."""
    try:
        yield
    except LlamaMiniError as error:
        raise type(error)(f"{what}: {error}") from None


class LlamaMiniWarning(UserWarning):
    """Something unusual in a checkpoint, which can still be used."""

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


def warn(message: str) -> None:
    """Issues a LlamaMiniWarning that names the line outside this package that led to it."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith((f"{__package__}.", "functools")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, LlamaMiniWarning, stacklevel=level)


def _printable(message: str) -> str:
    """One line of bounded length. Names and values from a file may hold escape codes, which a terminal would obey."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message[:_MAX_LENGTH])
    return text if len(text) < _MAX_LENGTH else text[: _MAX_LENGTH - 3] + "..."
