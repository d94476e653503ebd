"""Runs the application: its address, signals and the log."""

import asyncio
import logging
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from llama_mini.errors import LlamaMiniError, RequestError
from llama_mini.server.limits import Connection
from llama_mini.server.settings import Settings
from llama_mini.validate import check_whole

IDLE_SECONDS = 65  # that a connection may stay open between requests: more than proxies keep theirs, nginx 60
SEND_BUFFER = 2**16  # bytes of a connection that the system holds; by itself it takes MBs, and tells of them late
CLOSE_SECONDS = 2  # that connections have to close once all requests have ended
SWITCH_SECONDS = 0.0005  # the engine's thread gives way to the event loop so soon; Python's 0.005 delays every token


def bind(host: str, port: int, settings: Settings) -> socket.socket:
    """The address, before anything is loaded. It refuses connections until it listens.

    Raises RequestError for an address that other machines reach, without a key; LlamaMiniError if it is not free.
    """
    check_whole("port", port, RequestError, minimum=0, maximum=65535)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if not (settings.api_keys or ip_address(address[0]).is_loopback):
            raise RequestError(
                f"--host {host} can be reached from other machines: give --api-key or LLAMA_MINI_API_KEY too"
            )
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            listener.bind(address)
            stack.pop_all()
    except OSError as error:
        raise LlamaMiniError(f"cannot serve at {host} port {port}: {error.strerror}") from None
    return listener


def serve(app: Starlette, settings: Settings, listener: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C. Then requests that run have time to finish; the second time, none."""
    sys.setswitchinterval(SWITCH_SECONDS)
    with _log_to_standard_error():
        Server(app, settings).run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn, with deadlines for connections, and time for running requests when it is stopped."""

    def __init__(self, app: Starlette, settings: Settings) -> None:
        self._lifecycle, self._name = app.state.lifecycle, settings.model_names[0]
        config = uvicorn.Config(
            app,
            http=partial(Connection, settings),  # type: ignore[arg-type]
            ws="none",
            loop="asyncio",
            h11_max_incomplete_event_size=2 * settings.max_header_bytes,  # beyond it h11 refuses by itself
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            backlog=settings.max_connections,
            access_log=False,  # it has query strings
            log_config=None,
            log_level="error",
            proxy_headers=False,
            server_header=False,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{self._name} is served at {url}, Ctrl-C stops it", file=sys.stderr, flush=True)

    async def main_loop(self) -> None:
        await super().main_loop()  # until a signal
        await self._lifecycle.drain()  # connections are taken meanwhile, and new requests refused in a sentence

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, it does not raise the signals again: a server that was told to stop has not failed."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._lifecycle.stop)  # which also wakes the loop


@contextmanager
def _log_to_standard_error() -> Iterator[None]:
    log, handler = logging.getLogger("llama_mini.server"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(message)s"))
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _Formatter(logging.Formatter):
    """Of an error the place and the class: its message may hold a part of a prompt."""

    def formatException(self, info: Any) -> str:
        return "".join(traceback.format_tb(info[2])) + info[0].__name__
