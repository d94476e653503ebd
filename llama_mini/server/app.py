"""The application: which address does what."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llama_mini import __version__
from llama_mini.engine.async_call import AsyncCall
from llama_mini.engine.llm import LLM
from llama_mini.errors import RequestError
from llama_mini.server.api_request import ApiRequest, chat_request, text_request
from llama_mini.server.body import parse_body, read_body
from llama_mini.server.choices import ChatChoice, Choice, TextChoice
from llama_mini.server.errors import ApiError, as_api_error
from llama_mini.server.fields import field_of
from llama_mini.server.lifecycle import Lifecycle
from llama_mini.server.page import page_routes
from llama_mini.server.response import GenerationResponse
from llama_mini.server.security import Security
from llama_mini.server.settings import Settings
from llama_mini.server.tokenization import detokenize, tokenize
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import join_names, short_repr

Result = TypeVar("Result")


def create_app(llm: LLM, settings: Settings) -> Starlette:
    """The server's application for any ASGI server."""
    with suppress(RequestError):  # without llguidance, each request that needs it is refused
        llm.structures.read_vocabulary()
    api, lifecycle = Api(llm, settings), Lifecycle(llm, settings)
    post, get = ["POST"], ["GET"]
    models = JSONResponse({"object": "list", "data": [*api.models.values()]})
    chat, complete = partial(api.generate, chat_request, ChatChoice), partial(api.generate, text_request, TextChoice)
    routes = [
        *page_routes(),
        Route("/v1/chat/completions", chat, methods=post),
        Route("/v1/completions", complete, methods=post),
        Route("/v1/models", models, methods=get),
        Route("/v1/models/{name:path}", api.model),
        Route("/chat/completions", chat, methods=post),  # llama.cpp has these without /v1, too
        Route("/completions", complete, methods=post),
        Route("/models", models, methods=get),
        Route("/tokenize", partial(api.compute, tokenize), methods=post),
        Route("/detokenize", partial(api.compute, detokenize), methods=post),
        Route("/version", JSONResponse({"version": __version__}), methods=get),
        Route("/health", lifecycle.health),
        Route("/metrics", lifecycle.metrics.show),
    ]
    around = [Middleware(lifecycle.around), Middleware(Security, settings=settings)]
    handlers = {ApiError: _failed, HTTPException: _refused}
    app = Starlette(routes=routes, middleware=around, exception_handlers=handlers)
    app.router.redirect_slashes = False  # behind a proxy with TLS it would send clients to http
    app.state.lifecycle = lifecycle
    return app


class Api:
    """The endpoints of one model."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self._llm, self._settings = llm, settings
        common: dict[str, Any] = {"object": "model", "created": int(time.time()), "owned_by": "llama_mini"}
        common["max_model_len"] = llm.config.max_seq_len
        self.models = {name: {"id": name, "root": name, **common} for name in settings.model_names}
        self._lock, self._n_open = threading.Lock(), 0
        self._threads = ThreadPoolExecutor(thread_name_prefix="llama_mini request")

    async def compute(self, work: Callable[..., dict[str, Any]], http: HTTPRequest) -> Response:
        data = await read_body(http, self._settings)
        job = self._threads.submit(self._work, data, partial(work, llm=self._llm))
        return JSONResponse(await asyncio.wrap_future(job))

    async def model(self, http: HTTPRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self.models[http.path_params["name"]])

    async def generate(
        self, parse: Callable[[dict[str, Any], Tokenizer], ApiRequest], choice: type[Choice], http: HTTPRequest
    ) -> GenerationResponse:
        data, loop = await read_body(http, self._settings), asyncio.get_running_loop()
        user = http.scope["state"].get("cache_salt", "")  # of its API key

        def start(body: dict[str, Any]) -> tuple[ApiRequest, AsyncCall, str]:
            model = body.get("model", self._settings.model_names[0])
            asked = parse(body, self._llm.tokenizer)
            params = replace(asked.params, cache_salt=f"{user} {asked.params.cache_salt or ''}")
            self._enter(n := len(asked.prompts) * asked.params.n)
            try:
                return asked, self._llm.submit(asked.prompts, params, loop), model
            except BaseException:
                self._leave(n)
                raise

        job = self._threads.submit(self._work, data, start)
        try:
            asked, call, model = await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            job.add_done_callback(self._abandon)
            raise
        choices = [choice(i, asked, request, self._llm.tokenizer) for i, request in enumerate(call.requests)]
        return GenerationResponse(call, asked, choices, model, lambda: self._leave(len(choices)))

    def _work(self, data: bytes, work: Callable[[dict[str, Any]], Result]) -> Result:
        """Works on a body, in a thread: a template or a long prompt would hold up the event loop.

        Raises ApiError, which names the field that is wrong.
        """
        body: dict[str, Any] | None = None
        try:
            body = parse_body(data)
            if "model" in body:  # else it is the first one
                self._check_model(body["model"])
            return work(body)
        except Exception as error:
            failure = as_api_error(error)
            if failure.param is None and failure.status == 400 and body is not None:
                failure.param = field_of(error, body)
            raise failure from error

    def _abandon(self, job: "Future[tuple[ApiRequest, AsyncCall, str]]") -> None:
        """Ends the requests that were started for a client that has left meanwhile."""
        if not job.cancelled() and job.exception() is None:
            with job.result()[1] as call:
                self._leave(len(call.requests))

    def _enter(self, n: int) -> None:
        """Counts answers that begin to wait. Raises ApiError if there would be too many."""
        if n > (most := self._settings.max_queue):  # it would not help to ask again
            do = "give fewer prompts, or a smaller n"
            raise ApiError(400, f"{n} answers are more than the {most} that may run and wait: {do}")
        with self._lock:
            if self._n_open + n > most:
                raise ApiError(503, f"{n} more answers than the {self._n_open} that run and wait are more than {most}")
            self._n_open += n

    def _leave(self, n: int) -> None:
        with self._lock:
            self._n_open -= n

    def _check_model(self, name: Any) -> None:
        """Raises ApiError unless the model is one that is served."""
        if name not in self._settings.model_names:
            known = f"the models here are {join_names(self._settings.model_names)}"
            raise ApiError(404, f"model {short_repr(name)} does not exist: {known}", "model", "model_not_found")


async def _failed(http: HTTPRequest, error: Exception) -> Response:
    return as_api_error(error).response()


async def _refused(http: HTTPRequest, error: Exception) -> Response:
    """Starlette's own refusals: no such address, no such method."""
    assert isinstance(error, HTTPException)
    message = f"there is no {http.method} {http.url.path[:100]} here"
    return ApiError(error.status_code, message, headers=error.headers).response()
