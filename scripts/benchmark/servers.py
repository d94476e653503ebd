"""Servers that the bench starts: this engine's and others, by their commands, each with a free port."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from http import HTTPStatus
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil

from benchmark.engines import Checkpoint
from benchmark.rounds import environment
from llama_mini.errors import LlamaMiniError

PEER = "llama-server"
START_SECONDS = 600


class Server:
    """A server in a process of its own, ready once it is made, or one that runs at an address already.

    Raises LlamaMiniError with the last line of its log if it ends or is not ready in ten minutes.
    """

    def __init__(self, command: Sequence[str] | str) -> None:
        """command: words, in which {port} is replaced; or the address of a server."""
        self._process, self._log = None, tempfile.TemporaryFile()  # noqa: SIM115  closed with the server
        if isinstance(command, str):
            self.url = command.rstrip("/").removesuffix("/v1")
        else:
            port = str(free_port())
            self.url = f"http://127.0.0.1:{port}"
            words = [word.replace("{port}", port) for word in command]
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment()
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @cached_property
    def model(self) -> str:
        """The name of the first model that it serves."""
        with urlopen(f"{self.url}/v1/models", timeout=5) as reply:
            return json.load(reply)["data"][0]["id"]

    def cpu_seconds(self) -> float | None:
        """Processor time that it and its children took; None for one that was not started here."""
        if self._process is None:
            return None
        process = psutil.Process(self._process.pid)
        times = [each.cpu_times() for each in [process, *process.children(recursive=True)]]
        return sum(each.user + each.system for each in times)

    def close(self) -> None:
        """Ends it and the processes that it started."""
        if self._process is not None:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(self._process.pid)
                for each in [process, *process.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(self.url):
            ended = self._process is not None and self._process.poll() is not None
            if ended or self._process is None or time.monotonic() > deadline:
                self._log.seek(0)
                lines = self._log.read().decode(errors="replace").strip().splitlines() or ["no message"]
                raise LlamaMiniError(f"there is no server at {self.url}/v1: {lines[-1]:.300}")
            time.sleep(0.05)


def ours(files: Checkpoint, number_format: str, threads: int) -> list[str]:
    """The command of this project's server."""
    path, dtype, quantize = files.ours(number_format)
    options = ["--model", path, "--dtype", dtype, "--threads", str(threads), "--port", "{port}"]
    quantized = ["--quantize", quantize] if quantize else []
    return [sys.executable, "-m", "llama_mini.serve", *options, *quantized]


def llama_server(files: Checkpoint, number_format: str, users: int, settings: str) -> list[str]:
    """The command of llama.cpp's server with room for `users` at once. Raises LlamaMiniError if it is not installed."""
    program = shutil.which(PEER)
    if program is None:
        raise LlamaMiniError(f"{PEER} is not on the path")
    room = 640 * users  # positions: a request of the load has at most 620
    options = ["-m", files.fastest_gguf(number_format), "-np", str(users), "-c", str(room), "--port", "{port}"]
    return [program, *options, *settings.split()]


def llama_server_version() -> str:
    done = subprocess.run([PEER, "--version"], capture_output=True, text=True, check=False)
    return ", ".join((done.stdout + done.stderr).split("\n")[:2])


def command_of(text: str) -> list[str] | str:
    """What --server gives: an address as it is, or the words of a command."""
    return text if text.startswith(("http://", "https://")) else shlex.split(text)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _is_ready(url: str) -> bool:
    """Whether it answers, as /health says; llama.cpp's answers /v1/models before it can complete anything."""
    for path in ("/health", "/v1/models"):
        try:
            with urlopen(url + path, timeout=5) as reply:
                return reply.status == 200
        except HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                return False  # it loads still
        except (URLError, OSError):
            return False
    return False
