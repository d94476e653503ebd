"""Atomic writes: a file or directory is complete and synced to disk, or absent. It is written aside, then renamed."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_mini.errors import CheckpointPathError


def partial_prefix(target: Path) -> str:
    """The prefix of the temporary folder beside `target`. A killed process leaves that folder behind."""
    return f".{target.name}.partial-"


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path. The file written there replaces `target` at the end; other files in its folder go.

    Raises OSError and leaves `target` as it was.
    """
    with tempfile.TemporaryDirectory(prefix=partial_prefix(target), dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill. It becomes `target` at the end.

    Raises CheckpointPathError if `target` is a file or a folder that is not empty, or cannot be written.
    """
    temporary = target.parent / f"{partial_prefix(target)}{secrets.token_hex(8)}"
    try:
        check_new(target)
        temporary.mkdir(parents=True)  # with the permissions of any folder, which mkdtemp does not give
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointPathError(f"cannot write {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(target: Path) -> None:
    """Refuses a place for a directory that is taken or cannot be looked at, with a CheckpointPathError."""
    try:
        is_taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise CheckpointPathError(f"cannot write {target}: {error.strerror}") from None
    if is_taken:
        raise CheckpointPathError(f"{target} exists already; give a new or an empty directory")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
