"""A lock for one writer at a time of a file or directory. Each writer first removes what killed ones left behind."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llama_mini.checkpoint.io.atomic import partial_prefix
from llama_mini.errors import CheckpointPathError


@contextmanager
def one_writer(target: Path) -> Iterator[None]:
    """Waits for any other writer of `target`, then removes what killed ones left.

    The lock is a hidden file beside `target` for as long as it is held.

    Raises CheckpointPathError if the folder of `target` cannot be written.
    """
    path = target.parent / f".{target.name}.lock"
    lock = FileLock(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # if this fails, filelock would retry forever
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"waiting for another process that writes {target}", file=sys.stderr)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        reason = getattr(error, "strerror", None) or error
        raise CheckpointPathError(f"cannot write in {target.parent}: {reason}") from None
    try:
        for leftover in target.parent.glob(f"{partial_prefix(target)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        with suppress(OSError):  # Windows, where the release removes it
            path.unlink()  # while the lock is held: one that waits for it sees that and makes a new one
        lock.release()
