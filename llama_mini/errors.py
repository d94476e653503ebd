"""Every error that bad input can raise, and the exit code the command line gives it."""

_LONGEST = 1900


class LlamaMiniError(Exception):
    """The base: its message names the file or parameter, what was found, what was expected and what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


class ConfigError(LlamaMiniError):
    """A configuration or norm plan that no model can be built from."""

    exit_code = 3


class CheckpointError(LlamaMiniError):
    """A checkpoint that cannot be opened."""

    exit_code = 3


class CheckpointPathError(CheckpointError):
    """The path is absent, unreadable, or leaves the checkpoint's directory."""


class CheckpointFormatError(CheckpointError):
    """A file is broken, or is not of a format that the engine reads."""


class CheckpointIncompleteError(CheckpointError):
    """Files that belong to the checkpoint are missing."""


class CheckpointMismatchError(CheckpointError):
    """The tensors found are not the tensors that the configuration asks for."""


class TokenizerError(LlamaMiniError):
    """A tokenizer or chat template that cannot be loaded or used."""

    exit_code = 3


class RequestError(LlamaMiniError):
    """A prompt or sampling parameter that cannot be served."""

    exit_code = 2


class CapacityError(LlamaMiniError):
    """Something does not fit: in memory, in the cache, or in the context."""

    exit_code = 4


class NumericalError(LlamaMiniError):
    """The model produced NaN or infinity."""


class LlamaMiniWarning(UserWarning):
    """Something odd in a checkpoint that does not stop it from being used."""

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


def _printable(message: str) -> str:
    """One line of bounded length: names and values from a file may hold escape codes that a terminal would obey."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message[:_LONGEST])
    return text if len(text) < _LONGEST else text[: _LONGEST - 3] + "..."
