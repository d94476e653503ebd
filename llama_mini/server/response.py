"""The response to a request for answers: JSON at once, or a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llama_mini.engine.async_call import AsyncCall
from llama_mini.engine.request import Chunk, Request
from llama_mini.server.api_request import ApiRequest
from llama_mini.server.choices import Choice
from llama_mini.server.errors import ApiError, as_api_error

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class GenerationResponse:
    """An ASGI application that sends the answers of one call. If the client goes away, they leave the batch.

    Args:
        call: the requests, which run.
        choices: one for each request of the call.
        model: the name that the response states.
        ended: is called once, when the response ends, in whatever way.
    """

    def __init__(
        self, call: AsyncCall, asked: ApiRequest, choices: Sequence[Choice], model: str, ended: Callable[[], None]
    ) -> None:
        self._call, self._asked, self._choices, self._ended = call, asked, choices, ended
        self._of = dict(zip(call.requests, choices, strict=True))
        self._head = {
            "id": f"{choices[0].prefix}-{uuid.uuid4().hex}",
            "object": choices[0].chunk_kind if asked.stream else choices[0].kind,
            "created": int(time.time()),
            "model": model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["requests"] = self._call.requests  # for the log and the metrics
        respond = self._stream(send) if self._asked.stream else self._complete(scope, receive, send)
        work = asyncio.create_task(respond)
        gone = asyncio.create_task(_disconnected(receive))
        try:
            with self._call:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended()
            work.cancel()
            gone.cancel()
            for task in (gone, work):
                with suppress(asyncio.CancelledError):
                    await task  # raises what sending has raised

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        chunks: dict[Request, list[Chunk]] = {request: [] for request in self._call.requests}
        try:
            while self._call.n_open:
                for request, chunk in await self._call.next():
                    _check(request, chunk)
                    chunks[request].append(chunk)
            choices = [choice.complete(chunks[choice.request]) for choice in self._choices]
            extra = self._choices[0].extra_fields(streamed=False)
            response: Response = JSONResponse(self._head | {"choices": choices, "usage": self._usage()} | extra)
        except Exception as error:
            response = as_api_error(error).response()
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        begin = ""
        for choice in self._choices:
            if opening := choice.opening():
                begin += self._event(opening, {} if begin else choice.extra_fields(streamed=True))
        await send({"type": "http.response.body", "body": begin.encode(), "more_body": True})
        end = ""
        try:
            while self._call.n_open:
                events = ""
                for request, chunk in await self._call.next():
                    _check(request, chunk)
                    if part := self._of[request].streamed(chunk):
                        events += self._event(part)
                if events:  # one write for all
                    await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
            if self._asked.usage:
                end = _data(self._head | {"choices": [], "usage": self._usage()})
            end += "data: [DONE]\n\n"
        except OSError:
            raise
        except Exception as error:  # the status was sent: what is left is an event, then the end
            end = _data(as_api_error(error).body)
        await send({"type": "http.response.body", "body": end.encode()})

    def _event(self, choice: dict[str, Any], extra: Mapping[str, Any] = {}) -> str:
        usage = {"usage": self._usage()} if self._asked.usage_so_far else {}
        return _data({**self._head, "choices": [choice], **usage, **extra})

    def _usage(self) -> dict[str, Any]:
        """The numbers of tokens, a prompt counted once, whatever `n` is."""
        firsts = self._call.requests[:: self._asked.params.n]
        prompt = sum(len(request.prompt) for request in firsts)
        new = 0 if self._asked.no_answer else sum(choice.n_tokens for choice in self._choices)
        cached = sum(request.cached_tokens for request in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _data(event: dict[str, Any]) -> str:
    return f"data: {encode(event)}\n\n"


def _check(request: Request, chunk: Chunk) -> None:
    """Raises the error of a request that failed."""
    if chunk.finish_reason == "error":
        assert request.failure is not None
        raise request.failure
    if chunk.finish_reason == "abort":
        raise ApiError(503, "the server ends: ask again later")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
