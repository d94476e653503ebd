"""The lines of a batch file, and what each of them asks for."""

import codecs
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from llama_mini.cli.options import SET_BY_THE_COMMAND, checked_json
from llama_mini.errors import RequestError
from llama_mini.server.fields import given, token_biases
from llama_mini.validate import as_text, check_choice, short_repr

MAX_LINE = 16 << 20  # bytes: more than the text of a million tokens
NAMES = ("id", "custom_id")  # a line's own names for itself, which its result repeats
RAW = "/v1/completions"  # continues its prompt as plain text, as in OpenAI's API and in vLLM
PROMPTS = {"/v1/chat/completions": "messages", RAW: "prompt"}  # OpenAI's endpoints
VARIABLES = ("tools", "documents")  # of the chat template; chat_template_kwargs, vLLM's name, holds any others
# Fields of a request to OpenAI that change no answer. A file of results is no stream, and --model names the model.
HARMLESS = {"model", "user", "metadata", "stream", "stream_options", "store"}


@dataclass(frozen=True)
class Line:
    """A line that is not blank, counted from 0. Its digest, stored with its result, tells a later run if it changed."""

    index: int
    digest: str
    data: bytes
    n_bytes: int  # longer than `data` if the line is too long


@dataclass(frozen=True)
class Asked:
    """What a line asks for: a text, token ids or messages, variables of the chat template, settings of the sampling."""

    prompt: Any
    is_chat: bool | None  # None: a text is a chat or not as the command line says
    variables: dict[str, Any]
    settings: dict[str, Any]


def read_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    """The lines of an open file, read as they are needed. Raises RequestError if it is UTF-16."""
    for index in itertools.count():
        data = file.readline(MAX_LINE + 1)
        if not data:
            return
        if index == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            as_text(data, name, RequestError)
        data = data.removeprefix(codecs.BOM_UTF8) if index == 0 else data
        digest, n_bytes, part = hashlib.sha256(data.strip()), len(data), data
        while len(part) > MAX_LINE and not part.endswith(b"\n"):
            part = file.readline(MAX_LINE + 1)
            digest.update(part)
            n_bytes += len(part)
        if n_bytes > len(data) or data.strip():
            yield Line(index, digest.hexdigest()[:16], data, n_bytes)


def parse(line: Line) -> tuple[dict[str, Any], dict[str, Any]]:
    """The line's names for itself, and the rest of it. Raises RequestError if it is no JSON object."""
    if line.n_bytes > MAX_LINE + 1:
        raise RequestError(f"the line has {line.n_bytes:,} bytes; at most {MAX_LINE:,} are read: shorten its prompt")
    try:
        request = checked_json(as_text(line.data, "the line", RequestError), "the line")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RequestError(f'the line must be an object with "prompt" or "messages", not {short_repr(request)}')
    request = given(request)
    return {name: request.pop(name) for name in NAMES if name in request}, request


def asked(request: dict[str, Any]) -> Asked:
    """What the object of a line asks for. It may be in the form of OpenAI's batch files. Raises RequestError."""
    is_raw = "body" in request and request.get("url") == RAW
    if "body" in request:
        request = _body(request)
    if ("prompt" in request) == ("messages" in request):
        raise RequestError(f'the line must be an object with either "prompt" or "messages", not {short_repr(request)}')
    is_chat = "messages" in request
    prompt = request.pop("messages" if is_chat else "prompt")
    if not is_chat and isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):  # as OpenAI's
        (prompt,) = prompt
    variables = {name: request.pop(name) for name in VARIABLES if name in request}
    more = request.pop("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise RequestError(f"chat_template_kwargs must be an object, not {short_repr(more)}")
    if reserved := sorted(set(more) & set(SET_BY_THE_COMMAND)):
        raise RequestError(f"chat_template_kwargs: {reserved[0]} is set by the command: leave it out")
    if "logit_bias" in request:
        request["logit_bias"] = token_biases(request["logit_bias"])
    return Asked(prompt, is_chat or (False if is_raw else None), variables | more, request)


def _body(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request in OpenAI's form, as those of a line."""
    if unknown := sorted(request.keys() - {"method", "url", "body"}):
        raise RequestError(f'unknown {short_repr(unknown[0])} beside "body"; known: custom_id, method, url, body')
    url, body = request.get("url"), request["body"]
    check_choice("method", request.get("method", "POST"), ["POST"], RequestError)
    if not isinstance(body, dict):
        raise RequestError(f"body must be an object, not {short_repr(body)}")
    fields = {name: value for name, value in given(body).items() if name not in HARMLESS}
    if url is not None:
        check_choice("url", url, PROMPTS, RequestError)
        if PROMPTS[url] not in fields:
            raise RequestError(f"the body of a request to {url} must have {PROMPTS[url]!r}: {short_repr(body)}")
    return fields
