"""Errors as OpenAI's API shows them: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from llama_mini.errors import CapacityError, ContextError, LlamaMiniError, RequestError, TokenizerError

INVALID, SERVER = "invalid_request_error", "server_error"
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
log = logging.getLogger("llama_mini.server")


class ApiError(Exception):
    """What a client is told, with status 503 also when to try again.

    `param` is the field of its request that is wrong; `code` is for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = ({"Retry-After": "1"} if status == 503 else {}) | dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, INVALID if self.status < 500 else SERVER)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


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
