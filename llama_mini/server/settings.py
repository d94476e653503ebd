"""Settings of the server, checked."""

import re
from dataclasses import dataclass

from llama_mini.errors import RequestError
from llama_mini.validate import check_number, check_whole, short_repr


@dataclass(frozen=True)
class Settings:
    """Whom the server answers, and how much it takes from one client. The command has options for the first ones.

    Args:
        model_names: the names that a request may give as `model`; the first one stands in the responses.
        api_keys: one of them must come with each request; none: everybody may ask.
        allowed_hosts: names besides localhost that the Host header may have. With keys and no names, any.
        allowed_origins: web pages, such as https://example.com, that may ask, besides the server's own; `*` is any.
        max_queue: answers that may run and wait at a time; more get status 503.
        grace_seconds: that running requests have to finish once the server is told to stop.
        max_connections: more get status 503. Many systems allow a process 1,024 files.
        receive_seconds: that the head of a request may take, and its body.
        send_seconds: within which a reader must take at least `least_bytes` of what waits for it.
        keepalive_seconds: of silence in a stream, after which a comment tells proxies that it lives.

    Raises RequestError.
    """

    model_names: tuple[str, ...] = ("llama_mini",)
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = 512
    grace_seconds: float = 30.0
    max_connections: int = 700
    max_header_bytes: int = 2**14
    max_body_bytes: int = 2**24
    receive_seconds: float = 30.0
    send_seconds: float = 30.0
    least_bytes: int = 2**14
    keepalive_seconds: float = 15.0

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise RequestError("the name of a served model is empty: give one that requests can name")
        for key in self.api_keys:
            if not re.fullmatch(r"[!-~]+", key):  # the key itself never stands in a message
                raise RequestError("an API key must be printable ASCII without spaces: choose another one")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise RequestError(
                    f"an allowed origin must be like https://example.com, or *, not {short_repr(origin)}"
                )
        check_whole("max_queue", self.max_queue, RequestError, minimum=0)
        check_number("grace_seconds", self.grace_seconds, RequestError, minimum=0)
