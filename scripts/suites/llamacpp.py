"""A pytest plugin with which llama.cpp's server tests run against our server, with the default checkpoint.

Their launcher starts ours; of its options only names and keys are taken over. What the tests say of their own small
model, such as its words and its count of tokens, cannot come true.
"""

import sys
import types
from typing import Any

import pytest

from llama_mini.cli.default_model import ensure_default_checkpoint
from suites.servers import server_with

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
NAMES = ("gpt-3.5-turbo-instruct", "gpt-3.5-turbo", "davinci-002")  # that the tests ask for, of a server of any name

sys.modules["wget"] = types.ModuleType("wget")  # which their launcher imports, to download models


def pytest_collection_finish() -> None:
    utils: Any = sys.modules["utils"]
    utils.ServerProcess.start = _start
    utils.ServerProcess.stop = lambda _: None
    utils.ServerPreset.load_all = lambda: None
    # A request to a server that hangs fails in seconds, not in ten minutes.
    utils.ServerProcess.make_request.__defaults__ = (None, None, 60, None)


def _start(process: Any, **_: Any) -> None:
    if process.model_hf_repo != "ggml-org/test-model-stories260K" and not process.cors_origins:
        pytest.skip("another model")
    names = [(process.model_alias or "default").split(",")[0], *NAMES]
    options = [
        "--model",
        str(ensure_default_checkpoint()),
        *(word for name in names for word in ("--served-model-name", name)),
    ]
    address = server_with(*options, *(["--api-key", process.api_key] if process.api_key else []))
    process.server_port = int(address.rpartition(":")[2])
