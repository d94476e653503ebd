"""Limits of one connection: the time of a request, and the time to take the response."""

import asyncio
from contextlib import suppress
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_mini.server.errors import ApiError
from llama_mini.server.settings import Settings

EXTRA_SECONDS = 2.0  # that the head of a request may take on a connection that is one too many
DROPPED_BODIES = 4  # times the largest body that is taken: so much more is read of a larger one


class Connection(H11Protocol):
    """A connection of uvicorn with deadlines: those of uvicorn itself begin again with each byte."""

    def __init__(self, settings: Settings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._settings, self._is_extra = settings, False
        self._app, self.app = self.app, self._respond
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that any byte that is not taken starts the clock
        self._is_extra = len(self.connections) > self._settings.max_connections
        seconds = self._settings.receive_seconds
        self._receive_within(min(seconds, EXTRA_SECONDS) if self._is_extra else seconds)

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

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app. Where it responds before the body has come, the rest of the body is read and dropped.

        A system that closes a connection of which bytes are unread takes back the response, too.
        """
        app, held = self._app, False
        if self._is_extra and scope["path"] != "/health":
            app = ApiError(503, "too many connections are open: try again", headers={"Connection": "close"}).response()

        async def send_but_end(message: Message) -> None:
            nonlocal held
            if self._body_comes and message["type"] == "http.response.body" and not message.get("more_body", False):
                held, message = True, {**message, "more_body": True}
            await send(message)

        await app(scope, receive, send_but_end)
        if held:
            await self._drop_body(receive)
            await send({"type": "http.response.body"})

    async def _drop_body(self, receive: Receive) -> None:
        """Reads what comes of it, within the time that a body may take, and bytes."""
        left = DROPPED_BODIES * self._settings.max_body_bytes
        with suppress(TimeoutError, asyncio.CancelledError):  # cancelled: the server ends
            async with asyncio.timeout(self._settings.receive_seconds):
                while self._body_comes and left > 0 and not self.transport.is_closing():
                    left -= len((await receive()).get("body", b""))

    @property
    def _body_comes(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._body_comes:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """To what is not HTTP, a head without end, or a wrong length."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = ApiError(400, "the request is not valid HTTP/1.1, or its head is too long").response()
            head = h11.Response(status_code=400, headers=[*response.raw_headers, (b"connection", b"close")])
            for event in (head, h11.Data(bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()  # where a response has begun, there is no place for another one

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
