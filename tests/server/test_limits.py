"""Limits of one client, on real sockets: bytes and time of a request, and the time to take the reply."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llama_mini.server.body import read_body
from llama_mini.server.run import Server
from llama_mini.server.settings import Settings
from tests.server.live import SECONDS, ask, connect, head, parsed, post, read_all, read_until, serving, until, wrapped

SETTINGS = Settings(
    max_header_bytes=4096, max_body_bytes=2**20, receive_seconds=0.3, send_seconds=0.3, keepalive_seconds=SECONDS
)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells the size of the body."""
    data = await read_body(Request(scope, receive), SETTINGS) if scope["method"] == "POST" else b""
    await JSONResponse({"bytes": len(data)})(scope, receive, send)


def upload(**headers: object) -> bytes:
    return head("POST", content_type="application/json", **headers)


@pytest.fixture(scope="module")
def echoing() -> Iterator[tuple[Server, int]]:
    with serving(wrapped(echo, SETTINGS), SETTINGS) as served:
        yield served


def test_a_body_of_the_greatest_size_is_taken(echoing: tuple[Server, int]) -> None:
    _, port = echoing
    whole = upload(content_length=2**20) + b"x" * 2**20
    assert ask(port, whole)[2] == b'{"bytes":1048576}'
    chunks = upload(transfer_encoding="chunked") + b"4\r\nabcd\r\n" * 9 + b"0\r\n\r\n"
    assert ask(port, chunks)[2] == b'{"bytes":36}'
    assert ask(port, head())[2] == b'{"bytes":0}'


def test_a_body_that_is_too_large_is_refused_unread(echoing: tuple[Server, int]) -> None:
    _, port = echoing
    status, _, body = ask(port, upload(content_length=10 * 2**30))  # no byte of it follows
    assert status == 413
    assert b"at most 1048576 bytes" in body


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [({"content_length": 3 * 2**19}, 413), ({"transfer_encoding": "chunked"}, 413), ({"host": "evil"}, 403)],
    ids=["length", "chunks", "host"],
)
def test_a_client_that_sends_all_of_its_body_first_gets_to_read_why_it_is_refused(
    echoing: tuple[Server, int], headers: dict[str, object], status: int, connection: str
) -> None:
    """A system that closes a connection with unread bytes resets it, and what the client has not read is lost."""
    _, port = echoing
    data = b"x" * (3 * 2**19)
    if "content_length" not in headers:
        headers, data = headers | {"transfer_encoding": "chunked"}, b"180000\r\n" + data + b"\r\n0\r\n\r\n"
    with connect(port, upload(connection=connection, **headers)) as client:
        for at in range(0, len(data), 2**16):
            client.sendall(data[at : at + 2**16])
        reply = read_until(client, b"}}")
        assert parsed(reply)[0] == status
        if connection == "close":
            assert client.recv(1) == b""
        else:
            client.sendall(head())
            assert b'{"bytes":0}' in read_until(client, b"0}")  # the connection is still good


def pour(client: socket.socket) -> None:
    for _ in range(20_000):  # 1.2 GiB
        client.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")


def test_a_body_without_end_is_refused_at_the_limit_and_then_cut(echoing: tuple[Server, int]) -> None:
    _, port = echoing
    with (
        connect(port, upload(transfer_encoding="chunked")) as client,
        pytest.raises(OSError, match=r"reset|pipe"),
    ):
        pour(client)
    with connect(port, upload(transfer_encoding="chunked") + b"80000\r\n" + b"x" * 2**19) as client:
        client.sendall(b"\r\n80001\r\n" + b"x" * (2**19 + 1) + b"\r\n")
        assert parsed(read_until(client, b"}}"))[0] == 413  # to one that goes on for a moment
        client.sendall(b"0\r\n\r\n" + head("GET"))
        assert b'{"bytes":0}' in read_until(client, b"0}")  # the connection is still good


def test_headers_that_are_too_large_are_refused(echoing: tuple[Server, int]) -> None:
    _, port = echoing
    assert ask(port, head(x="a" * 3900))[0] == 200
    assert ask(port, head(x="a" * 4096))[0] == 431
    assert ask(port, head(**{f"x-{i}": "" for i in range(800)}))[0] == 431


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nx: " + b"a" * 2**14,  # its end has not come
        b"GET / HTTP/1.1\r\n\r\n",  # without a host
        b"\x16\x03\x01\x02\x00\r\n\r\n",  # TLS
        upload(content_length=-1),
        upload(transfer_encoding="chunked") + b"zz\r\n",
    ],
    ids=["endless", "host", "tls", "length", "chunk"],
)
def test_what_is_not_http_is_refused_as_all_else(echoing: tuple[Server, int], sent: bytes) -> None:
    _, port = echoing
    with connect(port, sent) as client:
        status, headers, body = parsed(read_all(client))
    assert (status, headers["connection"], headers["content-type"]) == (400, "close", "application/json")
    error = json.loads(body)["error"]
    assert (error["type"], error["message"]) == (
        "invalid_request_error",
        "the request is not valid HTTP/1.1, or its head is too long",
    )


def test_a_body_that_breaks_after_its_reply_ends_the_connection(
    echoing: tuple[Server, int], caplog: pytest.LogCaptureFixture
) -> None:
    _, port = echoing
    with connect(port, upload(host="evil", transfer_encoding="chunked")) as client:
        assert parsed(read_until(client, b"}}"))[0] == 403
        client.sendall(b"zz\r\n")
        assert read_all(client) == b""
    assert not caplog.records


def test_two_hundred_clients_that_drip_are_closed_and_cost_others_nothing(echoing: tuple[Server, int]) -> None:
    server, port = echoing
    clients = [connect(port, head()[: i % 20]) for i in range(200)]
    closed, dripped = 0, 0
    for _ in range(300):
        assert ask(port, head(path="/health"))[0] == 200
        for client in list(clients):
            try:
                client.sendall(b"x")  # each byte would put off the deadline of uvicorn
                dripped += 1
                client.settimeout(0.0001)
                assert client.recv(1) == b""
            except (TimeoutError, BlockingIOError):
                continue
            except (ConnectionResetError, BrokenPipeError):
                pass
            closed += 1
            client.close()
            clients.remove(client)
        if not clients:
            break
    assert closed == 200 < dripped
    assert len(server.server_state.connections) <= 1


def test_a_body_that_does_not_arrive_is_refused(echoing: tuple[Server, int]) -> None:
    _, port = echoing
    with connect(port, upload(content_length=5) + b"half") as client:
        status, _, body = parsed(read_until(client, b"}}"))
    assert status == 408
    assert b"did not arrive within 0.3 seconds" in body


def test_between_requests_a_connection_may_rest(echoing: tuple[Server, int]) -> None:
    _, port = echoing
    with connect(port, head()) as client:
        read_until(client, b"0}")
        with connect(port) as silent:
            assert read_all(silent) == b""  # longer than a request may take
        client.sendall(head()[:20])
        client.sendall(head()[20:])
        assert b" 200 " in read_until(client, b"0}")


class Stream:
    """Sends without end, and tells when its client was gone and how much it had sent."""

    def __init__(self) -> None:
        self.sent, self.ended = 0, threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def events() -> AsyncIterator[bytes]:
            while True:
                self.sent += 1000
                yield b"data: %994d" % self.sent
                await asyncio.sleep(0)

        try:
            if scope["path"] == "/stream":
                await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)
            else:
                await echo(scope, receive, send)
        finally:
            if scope["path"] == "/stream":
                self.ended.set()


def test_a_reader_that_hardly_reads_is_closed() -> None:
    stream = Stream()
    with serving(wrapped(stream, SETTINGS), SETTINGS) as (_, port), connect(port, head(path="/stream"), 4096) as client:
        for _ in range(500):
            if stream.ended.wait(0.02):
                break
            client.recv(1)
            assert ask(port, head())[0] == 200  # others are served
        assert stream.ended.is_set()
        assert stream.sent < 8 * 2**20  # what the systems of both sides hold, and no more


def test_a_short_reply_that_nobody_reads_is_dropped() -> None:
    async def sized(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"x" * int(scope["path"][1:]))(scope, receive, send)

    with serving(wrapped(sized, SETTINGS), SETTINGS) as (server, port):
        size, left = 2**16, 0
        while not left:  # what the systems of both sides take by themselves
            size += 2**15
            with connect(port, head(path=f"/{size}"), 4096) as client:
                assert client.recv(1) == b"H"
                until(lambda: not server.server_state.tasks)
                (connection,) = server.server_state.connections
                left = connection.transport.get_write_buffer_size()
                if left:
                    assert left < 2**16  # less than uvicorn would wait for
                    until(lambda: not server.server_state.connections)
            until(lambda: not server.server_state.connections)


@pytest.mark.slow
def test_a_reader_that_is_slow_but_reads_is_served() -> None:
    settings = replace(SETTINGS, least_bytes=100, send_seconds=0.5)

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse("x" * 2**21)(scope, receive, send)

    asked = head(connection="close")
    with serving(wrapped(large, settings), settings) as (server, port), connect(port, asked, 2**15) as client:
        got = read_until(client, b"\r\n\r\n")
        (connection,) = server.server_state.connections
        for step in range(1, 3):  # in each it rests for as long as it may, and then takes something
            timer = connection._sending
            while len(got) < step * 2**16:
                got += client.recv(2**16)
            until(lambda timer=timer: connection._sending is not timer)
        got += read_all(client)
    assert len(parsed(got)[2]) == 2**21 + 2


def test_connections_beyond_the_limit_are_told_so() -> None:
    settings = replace(SETTINGS, max_connections=3, receive_seconds=SECONDS)
    with serving(wrapped(echo, settings), settings) as (server, port), ExitStack() as stack:
        held = [stack.enter_context(connect(port, head())) for _ in range(3)]
        for client in held:
            read_until(client, b"0}")
        status, headers, body = ask(port, post("/v1/completions", {}))
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert b"too many connections" in body
        assert ask(port, head(path="/health"))[0] == 200
        held[0].close()
        until(lambda: len(server.server_state.connections) == 2)
        assert ask(port, head())[0] == 200


def test_a_client_that_leaves_before_its_body_is_no_error(
    echoing: tuple[Server, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llama_mini.server")
    server, port = echoing
    with connect(port, upload(content_length=5)) as client:
        until(lambda: bool(server.server_state.tasks))
        client.shutdown(socket.SHUT_RDWR)
    until(lambda: not server.server_state.tasks)

    assert "POST / 499" in caplog.text
    assert "ERROR" not in caplog.text
