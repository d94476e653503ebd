"""Runs chat templates. A template is a program from a checkpoint, and checkpoints are untrusted.

`render` sends a template and its variables to a worker process (template_worker.py), which has limits on memory, time
and output. Starting a Python for each render would take 50 ms, so the worker is kept for the next one. It is replaced
after a render that failed or that left the process larger, after its death, and in a forked child.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_mini.errors import TokenizerError, warn

WORKER = Path(__file__).with_name("template_worker.py").resolve()
KEPT_ENVIRONMENT = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")  # the local time; what Python itself may need to start
READY = b"ready\n"  # the worker's first bytes: they prove that what was started is a Python
MAX_TEMPLATE_CHARS = 1_000_000
MAX_TEXT_CHARS = 16_000_000
MAX_ANSWER_BYTES = 6 * MAX_TEXT_CHARS + 100  # JSON writes a control character as \u0000
MAX_ERROR_CHARS = 300
MAX_MEMORY = 512 << 20
MAX_CPU_SECONDS = 3.0
MAX_SECONDS = 10.0


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a Jinja template, as transformers renders it. Raises TokenizerError for any failure."""
    match _answer({"template": template, "variables": dict(variables), "max_chars": MAX_TEXT_CHARS}):
        case {"text": str(text)}:
            return text
    raise _stopped("its process gave no valid answer")


@lru_cache(maxsize=8)
def read_by(template: str) -> tuple[list[str], str]:
    """The variables that a Jinja template reads, and what it takes as content: "text", "parts" or "either".

    Raises TokenizerError for any failure.
    """
    match _answer({"template": template}):
        case {"names": [*names], "content": "text" | "parts" | "either" as content} if all(
            isinstance(name, str) and name.isidentifier() for name in names
        ):
            return names, content
    raise _stopped("its process gave no valid answer")


def _answer(request: dict[str, Any]) -> Any:
    if (length := len(request["template"])) > MAX_TEMPLATE_CHARS:
        raise _stopped(f"it has {length:,} characters, the limit is {MAX_TEMPLATE_CHARS:,}")
    answer = _SANDBOX.answer(request)
    if isinstance(answer, dict) and isinstance(error := answer.get("error"), str):
        raise TokenizerError(f"the chat template failed: {_one_line(error)}")
    return answer


class _NoPython(Exception):
    """There is no Python interpreter to start the worker with."""


class _WorkerDied(TokenizerError):
    """The worker ended, but not because a render reached a limit."""


class _Sandbox:
    """The worker of this process, shared by all tokenizers. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._not_pythons: set[str] = set()  # values of sys.executable that a warning has named
        atexit.register(self._close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_worker)

    def answer(self, request: dict[str, Any]) -> Any:
        """The worker's answer, or this process's own if no worker can be started."""
        with self._lock:
            if sys.executable not in self._not_pythons:
                try:
                    return self._worker_answer(request)
                except _NoPython:
                    self._not_pythons.add(sys.executable)
                    warn(
                        "chat templates run inside this process, in jinja2's sandbox but without limits on memory and "
                        f"time, since sys.executable, {sys.executable!r}, is not a Python interpreter; chat only with "
                        "checkpoints that you trust"
                    )
        from llama_mini.tokenizer import template_worker

        return template_worker.answer(request)

    def _worker_answer(self, request: dict[str, Any]) -> Any:
        # Not \u escapes: reading them back joins the two halves of a surrogate pair that the text holds apart.
        data = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        command = [_python(), "-I", "-S", str(WORKER), str(MAX_MEMORY), str(MAX_CPU_SECONDS), *_library_folders()]
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        if self._worker is not None and self._worker.started_with == (command, environment):
            with suppress(_WorkerDied):  # it may have been killed while it waited: a new one gets the request again
                return self._ask(data)
        self._close()
        self._worker = _Worker(command, environment)
        return self._ask(data)

    def _ask(self, data: bytes) -> Any:
        """The worker is kept only if it says so. An interrupted one may still answer, but nobody waits for that."""
        keep = False
        try:
            assert self._worker is not None
            answer = self._worker.answer(data)
            keep = isinstance(answer, dict) and answer.get("keep") is True
            return answer
        finally:
            if not keep:
                self._close()

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _forget_worker(self) -> None:
        """In a forked child, the worker is the parent's, and the lock may belong to a thread of the parent."""
        self._lock = threading.Lock()
        if self._worker is not None:
            self._worker.forget()
            self._worker = None


class _Worker:
    """A process that renders one template after the other. A message is its length in four bytes, then JSON."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.started_with = (command, environment)
        self._is_ready = False
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=os.path.abspath(os.sep),  # it outlives the caller's folder
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal does not reach it
            )
        except OSError as error:
            raise TokenizerError(f"the process that renders the chat template did not start ({error})") from error

    def answer(self, request: bytes) -> Any:
        """The answer to a request. The worker reads all of it before it answers, so neither waits for the other."""
        started = time.monotonic()
        timer = threading.Timer(MAX_SECONDS, self._process.kill)
        timer.start()
        try:
            if not self._is_ready:
                first = self._read(len(READY))
                self._is_ready = first == READY
                if not self._is_ready and (first or self._process.wait() >= 0):
                    raise _NoPython
            with suppress(OSError):  # it has died: its exit code says why
                self._write(len(request).to_bytes(4) + request)
            size = int.from_bytes(head) if len(head := self._read(4)) == 4 else None
            if size is not None and size > MAX_ANSWER_BYTES:
                raise _stopped(f"its answer is longer than {MAX_ANSWER_BYTES:,} bytes")
            if size is not None and len(answer := self._read(size)) == size:
                with suppress(RecursionError, ValueError):
                    return json.loads(answer.decode("utf-8", "surrogatepass"))
                return None
            exit_code = self._process.wait()
        finally:
            timer.cancel()
        if time.monotonic() - started >= MAX_SECONDS:
            raise _stopped(f"it took more than {MAX_SECONDS:g} seconds")
        if exit_code == -getattr(signal, "SIGPROF", -1):
            raise _stopped(f"it took more than {MAX_CPU_SECONDS:g} seconds of processor time")
        raise _stopped(f"its process ended with exit code {exit_code}", _WorkerDied)

    def close(self) -> None:
        self._process.kill()
        with self._process:  # closes the pipes and waits: no zombie is left
            pass

    def forget(self) -> None:
        """Closes this process's copies of the pipes, and nothing more."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.returncode = 0  # else Popen warns that it is still running

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[self._process.stdin.write(remaining) :]

    def _read(self, n_bytes: int) -> bytes:
        """The next `n_bytes` bytes, or fewer if the worker ends."""
        assert self._process.stdout is not None
        data = bytearray()
        while part := self._process.stdout.read(min(n_bytes - len(data), 1 << 20)):
            data += part
        return bytes(data)


def _python() -> str:
    """The running interpreter. Any other program must not be started: a frozen application would start itself again."""
    name = Path(sys.executable or "").name.lower()
    is_python = re.match("python|pypy|graalpy", name) is not None and Path(sys.executable).is_file()
    if not is_python or getattr(sys, "frozen", False):
        raise _NoPython
    return sys.executable


@cache
def _library_folders() -> list[str]:
    """Where jinja2 and its one dependency are."""
    specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
    return sorted({str(Path(spec.origin).resolve().parents[1]) for spec in specs if spec is not None and spec.origin})


def _stopped(reason: str, error: type[TokenizerError] = TokenizerError) -> TokenizerError:
    return error(f"the chat template was stopped: {reason}; repair the template, or complete raw text instead (--raw)")


def _one_line(message: str) -> str:
    """A message from an untrusted template, fit for a terminal."""
    printable = "".join(char if char.isprintable() else " " for char in message[:1000])
    return " ".join(printable.split())[:MAX_ERROR_CHARS]


_SANDBOX = _Sandbox()  # one for the process, not one for each tokenizer: a worker takes 20 MB
