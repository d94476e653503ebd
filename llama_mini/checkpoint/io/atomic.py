"""Writing files and directories that are whole, synced to disk, or not there at all: written aside, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_mini.errors import CheckpointPathError


def partial_prefix(target: Path) -> str:
    """How the name of the folder beside `target` begins in which it is made. A killed process leaves that folder."""
    return f".{target.name}.partial-"


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write a file to, which replaces `target` at the end; what else lies in its folder goes.

    Raises OSError, which leaves `target` as it was.
    """
    with tempfile.TemporaryDirectory(prefix=partial_prefix(target), dir=target.parent) as folder:
        made = Path(folder) / target.name
        yield made
        _sync(made)
        made.replace(target)
        _sync(target.parent)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end.

    Raises CheckpointPathError if `target` is a file or a folder that holds something, or cannot be written.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointPathError(f"{target} exists already; name a new or an empty directory")
    made = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=partial_prefix(target), dir=target.parent))
        made.chmod(0o777 & ~_umask())
        yield made
        for file in [*made.rglob("*"), made]:
            _sync(file)
        made.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointPathError(f"cannot write {target}: {error.strerror}") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    """The permissions that new files of this process go without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
