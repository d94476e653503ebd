"""Reading JSON and writing directories, so that a fault is one sentence and nothing on disk is ever half written."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_mini.errors import CheckpointFormatError, CheckpointPathError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointPathError if it cannot be read, CheckpointFormatError if broken."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointPathError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointFormatError(f"{path} is not UTF-8 text") from None
    except RecursionError:
        raise CheckpointFormatError(f"{path} is nested too deeply to be read") from None
    except ValueError as error:
        raise CheckpointFormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointFormatError(f"{path} holds a JSON {type(data).__name__}, not an object")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def partial_prefix(target: Path) -> str:
    """How the name of a folder begins, beside `target`, in which what becomes `target` is made."""
    return f".{target.name}.partial-"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A folder to fill, beside `target`, which becomes `target` at the end: whole, synced to disk, or not at all.

    Raises CheckpointPathError if `target` is a file or a folder that holds something, or cannot be written.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointPathError(f"{target} exists already; name a new or an empty directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=partial_prefix(target), dir=target.parent))
        aside.chmod(0o777 & ~umask())
    except OSError as error:
        raise CheckpointPathError(f"cannot write {target}: {error.strerror}") from None
    try:
        yield aside
        for file in [*aside.rglob("*"), aside]:
            _sync(file)
        aside.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointPathError(f"cannot write {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def umask() -> int:
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
