"""A server whose answers a test writes, for the page that a browser shows."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llama_mini.server.page import page_routes

MODEL = "stub <b>1</b>"


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Runs an app on a free port of this machine, in a thread. Yields its address."""
    config = uvicorn.Config(app, port=0, log_level="error", ws="none", timeout_graceful_shutdown=1)
    server, listener = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Stub:
    """A server that answers with `tokens`, or with `refusal`.

    Attributes:
        asked: the requests.
        held: the number of tokens after which an answer waits; `left` is set if its client leaves meanwhile.
        end: what the stream ends with, if not as it should.
        key: that requests must have.
    """

    def __init__(self) -> None:
        self.reset()
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        self.app = Starlette(routes=[*page_routes(), *routes])

    def reset(self) -> None:
        self.tokens = ["Fine", ", and", " you?"]
        self.refusal: Response | None = None
        self.end: list[str] | None = None
        self.key: str | None = None
        self.held: int | None = None
        self.left = threading.Event()
        self.asked: list[dict[str, Any]] = []

    async def models(self, http: Request) -> Response:
        return self.refused(http) or JSONResponse({"object": "list", "data": [{"id": MODEL}]})

    async def chat(self, http: Request) -> Response:
        self.asked.append(await http.json())
        events = StreamingResponse(self.events(), media_type="text/event-stream")
        return self.refused(http) or self.refusal or events

    def refused(self, http: Request) -> Response | None:
        wrong = self.key is not None and http.headers.get("authorization") != f"Bearer {self.key}"
        return JSONResponse({"error": {"message": "no key"}}, 401) if wrong else None

    async def events(self) -> AsyncIterator[str]:
        yield ": keepalive\n\n" + choice({"role": "assistant", "content": ""})
        for i, token in enumerate(self.tokens):
            while self.held is not None and i >= self.held:
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    self.left.set()
                    raise
            yield choice({"content": token}, likeliest(token, i))
        usage = {"choices": [], "usage": {"completion_tokens": len(self.tokens) + 1}}
        for event in [choice({}, reason="stop"), data(usage), "data: [DONE]\n\n"] if self.end is None else self.end:
            yield event


def data(event: Any) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def choice(delta: dict[str, str], entry: dict[str, Any] | None = None, reason: str | None = None) -> str:
    logprobs = {"content": [entry]} if entry else None
    return data({"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]})


def likeliest(token: str, i: int) -> dict[str, Any]:
    """A token of probability 0.5, but each third one is not among the likeliest."""
    rare = i % 3 == 2
    top = [("instead" if rare else token, 0.5), (" <i>\n", 0.02), ("other", 0.01), ("\t", 0.001), ("x", 0.0001)]
    entry = alternative(token, 0.00001 if rare else 0.5)
    return entry | {"top_logprobs": [alternative(*each) for each in top]}


def alternative(token: str, probability: float) -> dict[str, Any]:
    return {"token": token, "logprob": math.log(probability), "bytes": list(token.encode())}
