"""A pytest plugin with which vLLM's tests over HTTP run against our server, without vLLM.

Their launcher starts ours with the default checkpoint under the name that a test asks for; of its options keys and the
context are taken over, and one for tools gives the checkpoint a template that knows tools. The modules of vLLM are
empty, but for what the tests ask about their server, its version, and their model, the tokenizer and its size.
"""

import importlib.abc
import importlib.machinery
import inspect
import itertools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import MagicMock

import openai
import pytest

from llama_mini import __version__
from llama_mini.cli.default_model import ensure_default_checkpoint
from suites.servers import checkpoint_with, server_with

REQUIREMENT = "vllm==0.33.0"
SHA256 = "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112"
FOLDER = "tests/entrypoints"
FILES = (  # those of a server that completes text and chats; no images, audio, pooling, other APIs, vLLM's own options
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/chat_completion/test_root_path.py",
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/completion/test_token_in_token_out.py",
    "openai/models/test_models.py",
    "openai/test_chunked_prompt.py",
    "openai/test_return_token_ids.py",
    "openai/test_return_tokens_as_ids.py",
    "serve/instrumentator/test_basic.py",
    "serve/middleware/test_optional_middleware.py",
    "serve/tokenize/test_tokenization.py",
)
SECONDS = 30.0  # that a client waits: an answer of the whole context takes longer

TEMPLATE = """{%- macro turn(role, content) %}<|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro %}
{%- if tools %}
{%- set shown = tools | map("tojson") | join("\n") %}
{{- turn("system", 'To call a function, write <tool_call>{"name": ..., "arguments": ...}</tool_call>:\n' + shown) }}
{%- endif %}
{%- for message in messages %}
{%- set calls = message.tool_calls or [] %}
{%- set written = calls | map(attribute="function") | map("tojson") | join("\n") %}
{{- turn(message.role, (message.content or "") + ("<tool_call>" + written + "</tool_call>" if calls else "")) }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
{%- endif %}"""  # the default checkpoint's, with tools as in the models that the tests name


class RemoteOpenAIServer:
    """Stands for vLLM's launcher."""

    DUMMY_API_KEY = "token-abc123"
    show_hidden_metrics = False

    def __init__(
        self, model: str, args: Sequence[str] = (), env_dict: Mapping[str, str] | None = None, **_: Any
    ) -> None:
        options = dict(itertools.pairwise(args))
        context, template = options.get("--max-model-len"), TEMPLATE if "--tool-call-parser" in args else None
        checkpoint = checkpoint_with(None if context is None else int(context), template)
        key = options.get("--api-key") or (env_dict or {}).get("VLLM_API_KEY")
        self.url_root = server_with(checkpoint, "--served-model-name", model, *(["--api-key", key] if key else []))

    def __enter__(self) -> "RemoteOpenAIServer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *(part.lstrip("/") for part in parts)])

    def get_client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._settings(settings))

    def get_async_client(self, **settings: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._settings(settings))

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        fixed = {"base_url": self.url_for("v1"), "api_key": self.DUMMY_API_KEY, "max_retries": 0}
        return {**fixed, "timeout": SECONDS, **settings}


class _Empty(types.ModuleType):
    """A module or package whose every name is a mock."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `vllm` and all below it, what only tests of vLLM's inner parts import, and `tests.utils`."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in ("vllm", "pybase64", "fastapi") or name == "tests.utils":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Empty(spec.name)
        for name, value in _ANSWERS.get(spec.name, {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _tokenizer(*_: Any, **__: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_default_checkpoint())


class _ModelConfig:
    def __init__(self, **_: Any) -> None:
        pass

    def get_vocab_size(self) -> int:
        return len(_tokenizer())


_ANSWERS: dict[str, dict[str, Any]] = {
    "tests.utils": {"RemoteOpenAIServer": RemoteOpenAIServer, "ROCM_EXTRA_ARGS": []},
    "vllm": {"envs": types.SimpleNamespace(VLLM_USE_RUST_FRONTEND=False)},
    "vllm.version": {"__version__": __version__},
    "vllm.config": {"ModelConfig": _ModelConfig},
    "vllm.tokenizers": {"get_tokenizer": _tokenizer},
    "vllm.model_executor.model_loader.weight_utils": {"download_weights_from_hf": lambda name, **_: name},
}
sys.meta_path.insert(0, _Modules())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests that reach a server; the others test vLLM's own classes."""

    def reaches_a_server(item: pytest.Item) -> bool:
        assert isinstance(item, pytest.Function)
        used = any("server" in name or "client" in name for name in item.fixturenames)
        return used or "RemoteOpenAIServer" in inspect.getsource(item.function)

    config.hook.pytest_deselected(items=[item for item in items if not reaches_a_server(item)])
    items[:] = filter(reaches_a_server, items)
