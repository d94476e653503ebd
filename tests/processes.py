"""Processes that a test starts: none outlives it, and Ctrl-C reaches each of them however the tests were started."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def take_interrupts() -> None:
    """For preexec_fn: a shell starts its background jobs with SIGINT ignored, which their children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def child(*command: object, **options: Any) -> Iterator[Any]:
    """A subprocess.Popen that is killed at the end, if it still runs."""
    with subprocess.Popen([*map(str, command)], preexec_fn=take_interrupts, **options) as process:
        try:
            yield process
        finally:
            process.kill()
