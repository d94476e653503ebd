"""A client of the app in this process, without sockets; and models that write what a test tells them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from starlette.testclient import TestClient

from llama_mini import LLM
from llama_mini.server.app import create_app
from llama_mini.server.settings import Settings


class Client:
    """Requests to one app. What is posted has the model's usual name, unless the test says another."""

    def __init__(self, llm: LLM, **settings: Any) -> None:
        app = create_app(llm, Settings(model_names=("tiny", "other"), **settings))
        self.http = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)

    def __enter__(self) -> "Client":
        self.http.__enter__()  # one event loop for all requests
        return self

    def __exit__(self, *_: object) -> None:
        self.http.__exit__()

    def post(self, path: str, status: int = 200, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        reply = self.http.post(path, json=body, headers=headers)
        assert reply.status_code == status, reply.text
        return reply.json()

    def refused(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        """The error of a request that must be refused."""
        error = self.post(path, status, **body)["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        return error

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream; the last one must be [DONE] and is left out."""
        reply = self.http.post(path, json=body | {"stream": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        *events, done = sent(reply)
        assert done == "[DONE]"
        assert len({event["id"] for event in events}) == 1
        return events


def sent(reply: httpx.Response) -> list[Any]:
    lines = reply.text.split("\n\n")
    assert lines.pop() == ""
    data = [line.removeprefix("data: ") for line in lines]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


@contextmanager
def writing(llm: LLM, text: str, end: bool = True) -> Iterator[None]:
    """The model writes this text, whatever it is asked: its head gives these tokens. One request at a time."""
    ids = llm.tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    tokens = iter([*ids, *([llm.tokenizer.eos_id] if end else []), *[0] * 9])

    def answer(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(logits, -50.0)
        chosen[..., next(tokens)] = 50.0
        return chosen

    hook = llm.model.lm_head.register_forward_hook(answer)
    try:
        yield
    finally:
        hook.remove()
