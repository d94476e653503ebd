"""Servers on real sockets in a thread, and clients that speak HTTP by hand."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_mini.engine.scheduler import Activity
from llama_mini.server.lifecycle import Lifecycle
from llama_mini.server.run import Server, bind
from llama_mini.server.security import Security
from llama_mini.server.settings import Settings

SECONDS = 20.0  # after which a test that waits has failed


def wrapped(app: ASGIApp, settings: Settings) -> Starlette:
    """A stub of an app with all that stands around the real one, and its /health."""
    lifecycle = Lifecycle(SimpleNamespace(activity=Activity), settings)

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        chosen: Any = await lifecycle.health(None) if scope["path"] == "/health" else app
        await chosen(scope, receive, send)

    made = Starlette(middleware=[Middleware(lifecycle.around), Middleware(Security, settings)])
    made.router = routed
    made.state.lifecycle = lifecycle
    return made


@contextmanager
def serving(app: Starlette, settings: Settings) -> Iterator[tuple[Server, int]]:
    """A server in a thread, and its port."""
    with bind("127.0.0.1", 0, settings) as listener:
        server, ready, port = Server(app, settings), threading.Event(), listener.getsockname()[1]
        startup = server.startup

        async def started(sockets: list[socket.socket] | None = None) -> None:
            await startup(sockets)
            ready.set()

        server.startup = started
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            assert ready.wait(SECONDS)
            yield server, port
        finally:
            with suppress(RuntimeError):  # its loop is closed: the test has stopped it
                server.handle_exit(2, None)
                server.handle_exit(2, None)
            thread.join(SECONDS)
            assert not thread.is_alive()


def connect(port: int, sent: bytes = b"", buffer: int | None = None) -> socket.socket:
    """A client; `buffer` is the size of what its system takes before it reads."""
    client = socket.socket()
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.settimeout(SECONDS)
    try:
        client.connect(("127.0.0.1", port))
        client.sendall(sent)
    except OSError:
        client.close()
        raise
    return client


def head(method: str = "GET", path: str = "/", **headers: object) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in {"host": "localhost", **headers}.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode()


def post(path: str, body: dict[str, Any], **headers: object) -> bytes:
    data = json.dumps(body).encode()
    return head("POST", path, content_type="application/json", content_length=len(data), **headers) + data


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def read_all(client: socket.socket) -> bytes:
    """What the server sends until it closes the connection, also if it closes it without having read all."""
    got = b""
    try:
        while piece := client.recv(2**16):
            got += piece
    except ConnectionResetError:
        pass
    return got


def read_until(client: socket.socket, end: bytes) -> bytes:
    got = b""
    while end not in got:
        piece = client.recv(2**16)
        assert piece, got
        got += piece
    return got


def parsed(reply: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    first, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = first.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def ask(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """The reply to a request, after which the server closes the connection."""
    with connect(port, request.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)) as client:
        return parsed(read_all(client))
