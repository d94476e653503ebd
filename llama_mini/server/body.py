"""The body of a request: one JSON object, of limited size, read strictly."""

import asyncio
import json
from functools import partial
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from llama_mini.errors import RequestError
from llama_mini.server.errors import ApiError
from llama_mini.server.fields import given
from llama_mini.server.settings import Settings
from llama_mini.validate import as_dict, as_text

GONE = 499  # in the log: the client left before there was a response; nginx's number


async def read_body(http: Request, limits: Settings) -> bytes:
    """The bytes of a JSON body. Raises ApiError for another type, and if it is too large, too slow or cut off."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other types may be sent by any web page, without asking first
        raise ApiError(415, f"Content-Type must be application/json, not {kind or 'absent'!r:.100}")
    too_large = ApiError(413, f"the body is too large: at most {limits.max_body_bytes} bytes are taken")
    if int(http.headers.get("content-length", "0")) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.receive_seconds):
            async for part in http.stream():
                body += part
                if len(body) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.receive_seconds:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(GONE, "the client left") from None
    return bytes(body)


def parse_body(data: bytes) -> dict[str, Any]:
    """The fields that are given. Raises RequestError for anything but one JSON object in UTF-8."""
    pairs = partial(as_dict, "the body", error=RequestError)
    try:
        body = json.loads(as_text(data, "the body", RequestError), object_pairs_hook=pairs, parse_constant=_refuse)
        if b"\\u" in data:
            json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except UnicodeEncodeError:
        alone = "the body has half of a surrogate pair, such as \\ud83d alone"
        raise RequestError(f"{alone}: send whole characters") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}; send one JSON object") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {type(body).__name__}")
    return given(body)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
