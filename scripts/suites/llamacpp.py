"""A pytest plugin with which llama.cpp's server tests run against our server, with the default checkpoint.

Their launcher starts ours; of its options names, keys, pages and the context are taken over. Requests to endpoints of
their own are translated. What the tests say of their own small model, such as its words and its count of tokens, cannot
come true.
"""

import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from suites.native import translated, translated_stream
from suites.servers import checkpoint_with, server_with

REQUIREMENT = "llama_cpp_python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
FOLDER = "vendor/llama.cpp/tools/server/tests"
FILES = (  # no embeddings, images, adapters, saved slots, routers, other APIs; tool calls need their own models
    "unit/test_basic.py",
    "unit/test_chat_completion.py",
    "unit/test_completion.py",
    "unit/test_ctx_shift.py",
    "unit/test_ignore_eos.py",
    "unit/test_security.py",
    "unit/test_tokenize.py",
)
# Names that tests ask for, of a server that takes any; and those tests that count its names.
NAMES, COUNTED = ("gpt-3.5-turbo-instruct", "gpt-3.5-turbo", "davinci-002"), "unit/test_basic.py"
LOOPBACK = [f"http://{host}{port}" for host in ("localhost", "127.0.0.1", "[::1]") for port in ("", ":3000", ":8080")]

sys.modules["wget"] = types.ModuleType("wget")  # which their launcher imports, to download models


def pytest_collection_finish() -> None:
    utils: Any = sys.modules["utils"]
    process = utils.ServerProcess
    process.start, process.stop = _start, lambda _: None
    utils.ServerPreset.load_all = lambda: None
    process.make_request.__defaults__ = (None, None, 60, None)  # a hung request fails in a minute, not in ten
    plain = _any_case(process.make_request, utils.requests.structures.CaseInsensitiveDict)
    process.make_request = translated(plain)
    process.make_stream_request = translated_stream(process.make_stream_request, plain)


def _any_case(make_request: Callable[..., Any], headers: Callable[..., Any]) -> Callable[..., Any]:
    """They look for headers by the case in which their server writes the names; HTTP's names have none."""

    def request(*words: Any, **settings: Any) -> Any:
        reply = make_request(*words, **settings)
        reply.headers = headers(reply.headers)
        return reply

    return request


def _start(process: Any, **_: Any) -> None:
    origins = LOOPBACK if process.cors_origins == "localhost" else ("*",)  # theirs answers all pages unless told
    if process.model_hf_repo != "ggml-org/test-model-stories260K" and not process.cors_origins:
        pytest.skip("another model")
    others = () if os.environ["PYTEST_CURRENT_TEST"].startswith(COUNTED) else NAMES
    names = [(process.model_alias or "default").split(",")[0], *others]
    options: dict[str, Sequence[str]] = {"--served-model-name": names, "--allowed-origin": origins}
    if process.api_key:
        options["--api-key"] = [process.api_key]
    words = [word for option, values in options.items() for value in values for word in (option, value)]
    context = process.n_ctx if process.kv_unified else process.n_ctx // process.n_slots
    address = server_with(checkpoint_with(context), *words)
    process.server_port = int(address.rpartition(":")[2])
