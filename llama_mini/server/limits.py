"""Limits of one client: bytes and time of a request, and time to take the response."""

import asyncio
from typing import Any

import h11
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_mini.server.errors import ApiError
from llama_mini.server.settings import Settings

LINGER_SECONDS = 2.0  # that a client may go on sending a body after its response, so that it gets to read it


class Limits:
    """Takes the whole request before the app sees it, and refuses one that is too large or too slow."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body: bytes | None = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except ClientDisconnect:
            return

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Raises ApiError for a request that is too large or too slow, ClientDisconnect if the client goes away."""
        limits, headers = self._settings, scope["headers"]
        if (size := sum(len(name) + len(value) + 4 for name, value in headers)) > limits.max_header_bytes:
            raise ApiError(431, f"the headers have {size} bytes, at most {limits.max_header_bytes} are taken")
        too_large = ApiError(413, f"the body is too large: at most {limits.max_body_bytes} bytes are taken")
        if int(dict(headers).get(b"content-length", b"0")) > limits.max_body_bytes:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(limits.receive_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    if len(body) > limits.max_body_bytes:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limits.receive_seconds:g} seconds") from None
        return bytes(body)


class Connection(H11Protocol):
    """A connection of uvicorn with deadlines: those of uvicorn itself begin again with each byte."""

    def __init__(self, settings: Settings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._settings = settings
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that any byte that is not taken starts the clock
        seconds = self._settings.receive_seconds
        if len(self.connections) > self._settings.max_connections:
            self.app, seconds = _Busy(self.app), min(seconds, LINGER_SECONDS)
        self._receive_within(seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._receiving, self._sending):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        before = self.conn.their_state
        if before is h11.IDLE and self._receiving is None:  # the first byte of the next request
            self._receive_within(self._settings.receive_seconds)
        super().data_received(data)
        if self.conn.their_state is not before and self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def send_400_response(self, msg: str) -> None:
        """To what is not HTTP, a head without end, or a wrong length."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = ApiError(400, "the request is not valid HTTP/1.1, or its head is too long").response()
            head = h11.Response(status_code=400, headers=[*response.raw_headers, (b"connection", b"close")])
            for event in (head, h11.Data(bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()  # where a response has begun, there is no place for another one

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._receive_within(LINGER_SECONDS)

    def _receive_within(self, seconds: float) -> None:
        self._receiving = self.loop.call_later(seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size() + self._settings.least_bytes)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()

    def _watch_reader(self, before: int) -> None:
        """Closes the connection of a client that took less than `least_bytes` since `before` bytes waited for it."""
        left = self.transport.get_write_buffer_size()
        if before - left < self._settings.least_bytes:
            self.transport.abort()
        else:
            self._sending = self.loop.call_later(self._settings.send_seconds, self._watch_reader, left)


class _Busy:
    """The app of a connection that is one too many."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(503, "too many connections are open: try again", headers={"Connection": "close"})
        app = self._app if scope["path"] == "/health" else error.response()
        await app(scope, receive, send)
