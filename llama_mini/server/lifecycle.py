"""The life of every HTTP request: its line in the log, its counts, comments while it is silent, its end at shutdown."""

import asyncio
import json
import time
from contextlib import suppress
from functools import partial

from starlette.datastructures import Headers
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_mini.engine.llm import LLM
from llama_mini.server.body import GONE
from llama_mini.server.errors import ApiError, as_api_error, log
from llama_mini.server.metrics import Metrics
from llama_mini.server.settings import Settings

STOPPING = "the server is stopping: send the request again later"


class Lifecycle:
    """A middleware around the app, which puts the engine's requests into `scope["state"]["requests"]`."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self._settings, self.metrics = settings, Metrics(llm)
        self._open: set[asyncio.Future[None]] = set()
        self._stopping, self._drained = False, asyncio.Event()

    def around(self, app: ASGIApp) -> ASGIApp:
        return partial(self._serve, app)

    async def health(self, http: HTTPRequest) -> Response:
        return JSONResponse({"status": "stopping"}, 503) if self._stopping else JSONResponse({"status": "ok"})

    def stop(self) -> None:
        """Takes no more requests; the second time, those that run end at once."""
        if self._stopping:
            self._drained.set()
        self._stopping = True

    async def drain(self) -> None:
        """Waits until all requests have ended, for at most `grace_seconds`, and ends those that have not."""
        if self._open:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), self._settings.grace_seconds)
        for work in self._open:
            work.cancel()

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        if self._stopping and scope["path"] not in ("/health", "/metrics"):
            app = ApiError(503, STOPPING).response()
        scope.setdefault("state", {})
        started, response = time.perf_counter(), _Sent(scope, receive, send)
        work = asyncio.ensure_future(app(scope, receive, response.send))
        self._open.add(work)
        try:
            await self._keep_alive(work, response)
            if work.cancelled():
                await response.end(ApiError(503, STOPPING))
            else:
                work.result()
        except Exception as error:
            await response.end(as_api_error(error))
        finally:
            work.cancel()
            self._open.remove(work)
            if self._stopping and not self._open:
                self._drained.set()
            self._record(scope, response.status, time.perf_counter() - started)

    async def _keep_alive(self, work: "asyncio.Future[None]", response: "_Sent") -> None:
        """Waits for the end of the work, and sends comments meanwhile."""
        seconds = self._settings.keepalive_seconds
        while not work.done():
            await asyncio.wait((work,), timeout=max(response.sent_at + seconds - time.monotonic(), 0.0))
            if not work.done() and time.monotonic() >= response.sent_at + seconds:
                await response.keep_alive()

    def _record(self, scope: Scope, status: int | None, seconds: float) -> None:
        """One line: no prompt, no key, no query string."""
        client, requests = scope.get("client") or ("-",), scope["state"].get("requests", ())
        tokens = ""
        if requests:
            self.metrics.count(requests)
            cached, new = sum(r.cached_tokens for r in requests), sum(len(r.token_ids) for r in requests)
            tokens = f" prompt={sum(len(r.prompt) for r in requests)} cached={cached} new={new}"
            firsts = [r.completion.stats.ttft_seconds for r in requests if r.completion and r.token_ids]
            tokens += f" first={min(firsts):.3f}s" if firsts else ""
        path = scope["path"][:100].encode("unicode_escape").decode()
        log.info("%s %s %s %s%s all=%.3fs", client[0], scope["method"], path, status or GONE, tokens, seconds)


class _Sent:
    """What was sent of a response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.status: int | None = None
        self.sent_at = time.monotonic()
        self._sending = self._streams = self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._streams = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        else:
            self._ended = not message.get("more_body", False)
        self._sending = True
        try:
            await self._send(message)
        finally:
            self._sending, self.sent_at = False, time.monotonic()

    async def keep_alive(self) -> None:
        """Sends a comment in a silent stream; a proxy would close it after a minute."""
        if self._streams and not self._sending and not self._ended:
            await self.send({"type": "http.response.body", "body": b": keepalive\n\n", "more_body": True})
        self.sent_at = time.monotonic()

    async def end(self, error: ApiError) -> None:
        """Ends it with an error: as a response, or as an event if the stream has begun."""
        if self.status is None:
            await error.response()(self._scope, self._receive, self.send)
        elif self._streams and not self._ended:
            event = f"data: {json.dumps(error.body)}\n\n".encode()
            await self.send({"type": "http.response.body", "body": event})
