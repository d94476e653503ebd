"""The life of a request: its line in the log, comments in silence, errors that nobody foresaw, the end at shutdown."""

import asyncio
import json
import logging
import re
import threading
from dataclasses import replace

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from llama_mini.server.lifecycle import STOPPING
from llama_mini.server.settings import Settings
from tests.server.live import SECONDS, ask, connect, head, parsed, read_all, read_until, serving, until, wrapped

SETTINGS = Settings(keepalive_seconds=0.05, grace_seconds=SECONDS)
EVENTS = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


class Gated:
    """/stream sends an event, waits for the gate and sends the last one; /whole waits before it says anything.

    /parts waits in the midst of a text.
    """

    def __init__(self) -> None:
        self.gate, self.n_waiting = threading.Event(), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if scope["path"] == "/stream":
            await send(EVENTS)
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        elif scope["path"] == "/parts":
            await send(EVENTS | {"headers": []})
            await send({"type": "http.response.body", "body": b"a part, ", "more_body": True})
        elif scope["path"] == "/crash-in-stream":
            await send(EVENTS)
            raise KeyError("a secret of a prompt")
        elif scope["path"] == "/crash":
            raise KeyError("a secret of a prompt")
        if scope["path"] in ("/stream", "/whole", "/parts"):
            self.n_waiting += 1
            try:
                while not self.gate.is_set():
                    await asyncio.sleep(0.005)
            finally:
                self.n_waiting -= 1
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        elif scope["path"] == "/parts":
            await send({"type": "http.response.body", "body": b"done"})
        else:
            await PlainTextResponse("done")(scope, receive, send)


def test_comments_tell_that_a_silent_stream_lives() -> None:
    app = Gated()
    with serving(wrapped(app, SETTINGS), SETTINGS) as (_, port), connect(port, head(path="/stream")) as client:
        got = read_until(client, b"data: 1\n\n")
        while got.count(b": keepalive\n\n") < 3:
            got += client.recv(1000)
        app.gate.set()
        got += read_until(client, b"[DONE]\n\n\r\n0\r\n\r\n")
        assert got.index(b"data: 1") < got.index(b": keepalive") < got.index(b"[DONE]")
        client.sendall(head(path="/whole"))  # on the same connection: nothing came after the end
        assert parsed(read_until(client, b"done"))[2] == b"done"


def test_a_reply_that_is_no_stream_gets_no_comment() -> None:
    app = Gated()
    with serving(wrapped(app, SETTINGS), SETTINGS) as (_, port), connect(port, head(path="/parts")) as client:
        with connect(port, head(path="/stream")) as other:
            read_until(other, b": keepalive\n\n\r\nd\r\n: keepalive")
        app.gate.set()
        assert b"keepalive" not in read_until(client, b"done")


def test_running_requests_finish_and_new_ones_are_refused() -> None:
    app = Gated()
    with serving(wrapped(app, SETTINGS), SETTINGS) as (server, port):
        clients = [connect(port, head(path=path)) for path in ("/stream", "/stream", "/whole", "/stream")]
        until(lambda: app.n_waiting == 4)
        assert ask(port, head(path="/health"))[0] == 200
        server.handle_exit(15, None)
        until(lambda: ask(port, head(path="/health"))[0] == 503)
        status, headers, body = ask(port, head(path="/stream"))
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["message"] == STOPPING
        app.gate.set()
        assert [read_all(client).count(b"data: [DONE]") for client in clients] == [1, 1, 0, 1]
        until(lambda: not server.server_state.connections)
        for client in clients:
            client.close()
    with pytest.raises(ConnectionRefusedError):
        connect(port)


@pytest.mark.parametrize("how", ["grace", "second signal"])
def test_what_does_not_finish_in_time_ends_with_an_error(how: str) -> None:
    settings = replace(SETTINGS, grace_seconds=0.05 if how == "grace" else SECONDS)
    app = Gated()
    with serving(wrapped(app, settings), settings) as (server, port):
        with connect(port, head(path="/stream")) as stream, connect(port, head(path="/whole")) as whole:
            until(lambda: app.n_waiting == 2)
            server.handle_exit(15, None)
            if how != "grace":
                server.handle_exit(15, None)
            events = read_all(stream)
            status, headers, body = parsed(read_all(whole))
        assert app.n_waiting == 0
    last = re.findall(rb"data: (.*)\n\n", events)[-1]
    assert json.loads(last) == json.loads(body)
    assert json.loads(body)["error"]["message"] == STOPPING
    assert (status, headers["retry-after"]) == (503, "1")
    assert events.endswith(b"\r\n0\r\n\r\n")  # the stream is whole, as HTTP sees it


def test_an_unforeseen_error_is_a_reply_and_its_place_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with serving(wrapped(Gated(), SETTINGS), SETTINGS) as (_, port):
        status, _, body = ask(port, head(path="/crash"))
        assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
        with connect(port, head(path="/crash-in-stream")) as client:
            assert b'data: {"error": {"message": "the server failed' in read_until(client, b"0\r\n\r\n")
        assert b"secret" not in body
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def test_a_line_for_each_request_without_what_is_private(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama_mini.server")
    with serving(wrapped(Gated(), SETTINGS), SETTINGS) as (_, port):
        ask(port, head(path="/a%0ab%1b%5b31m?key=sk-secret", authorization="Bearer sk-secret", user_agent="sk-secret"))
        ask(port, head(path="/" + "x" * 500))
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"127\.0\.0\.1 GET /a\\nb\\x1b\[31m 200 all=\d\.\d{3}s", lines[0])
    assert re.fullmatch(r"127\.0\.0\.1 GET /x{99} 200 all=\d\.\d{3}s", lines[1])
    assert "sk-secret" not in caplog.text
