"""Who may ask: the names and web pages by which a browser reaches the server, and API keys; the size of headers."""

import secrets
from collections.abc import MutableMapping
from hashlib import sha256
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_mini.server.errors import ApiError
from llama_mini.server.settings import Settings
from llama_mini.validate import short_repr

OPEN_PATHS = ("/", "/health", "/openapi.yaml")  # without a key: a browser opens the page, a balancer asks for health


class Security:
    """Refuses a request before its body is read.

    A page of another site can make a browser send requests to this machine: the Origin header names the site. Or the
    name of the site itself leads to this machine (DNS rebinding), which is then its origin: the Host header has it.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [sha256(key.encode()).digest() for key in settings.api_keys]
        self._hosts = {host.lower() for host in settings.allowed_hosts}
        self._any_host = bool(self._keys) and not self._hosts
        self._origins, self._max_bytes = settings.allowed_origins, settings.max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, app, cors = Headers(scope=scope), self._app, None
        try:
            if (size := sum(len(name) + len(value) + 4 for name, value in headers.raw)) > self._max_bytes:
                raise ApiError(431, f"the headers have {size} bytes, at most {self._max_bytes} are taken")
            self._check_host(headers)
            cors = self._cors_headers(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                app = Response(status_code=200, headers=_preflight(headers) if cors else None)
            elif cors is None:
                page = short_repr(headers["origin"])
                raise ApiError(403, f"pages of {page} may not ask: give the server --allowed-origin for them")
            elif self._keys and scope["path"] not in OPEN_PATHS:
                scope.setdefault("state", {})["cache_salt"] = self._check_key(headers)
        except ApiError as error:
            app = error.response()

        async def send_with_cors(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(cors or {})
            await send(message)

        await app(scope, receive, send_with_cors if cors else send)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if not (self._any_host or (name := _name(host)) in self._hosts or _is_loopback(name)):
            raise ApiError(403, f"no Host is called {short_repr(host)} here: give the server --allowed-host for it")

    def _cors_headers(self, headers: Headers) -> dict[str, str] | None:
        """CORS headers, with which a browser lets a page of another origin read the response; None if it may not."""
        origin = headers.get("origin")
        if origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower():
            return {}
        if origin not in self._origins and "*" not in self._origins:
            return None
        return {"access-control-allow-origin": origin, "vary": "origin"}

    def _check_key(self, headers: Headers) -> str:
        """A salt, which keeps the users of different keys apart in the prefix cache. Raises ApiError."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = sha256(given.encode()).digest()
        if sum(secrets.compare_digest(digest, known) for known in self._keys):  # all of them, for equal times
            return digest.hex()
        what = "is wrong" if given else "is missing"
        message = f"the API key {what}: send the header Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _preflight(headers: Headers) -> dict[str, str]:
    return {
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": headers.get("access-control-request-headers", "authorization, content-type"),
        "access-control-max-age": "600",
    }


def _name(host: str) -> str:
    """The name or address in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
