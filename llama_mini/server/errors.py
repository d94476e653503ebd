"""Errors as OpenAI's API shows them: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from llama_mini.errors import CapacityError, ContextError, LlamaMiniError, RequestError, TokenizerError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
log = logging.getLogger("llama_mini.server")


@dataclass(eq=False)
class ApiError(Exception):
    """What a client is told, with status 503 also when to try again.

    `param` is the field of its request that is wrong; `code` is for programs.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        again = {"Retry-After": "1"} if self.status == 503 else {}
        return JSONResponse(self.body, self.status, {**again, **(self.headers or {})})


def as_api_error(error: BaseException) -> ApiError:
    """Any error as one for the client. What is wrong with a request has status 400; an unforeseen error is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, RequestError | CapacityError | TokenizerError):
        return ApiError(400, str(error))
    if isinstance(error, LlamaMiniError):
        return ApiError(500, str(error))
    log.error("unforeseen error", exc_info=error)
    return ApiError(500, "the server failed: its log has the reason")
