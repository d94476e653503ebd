"""How replies end: clients that go away, errors in the midst, too many; and requests in one batch."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from llama_mini import LLM
from llama_mini.engine import runner as runner_module
from llama_mini.server import app as app_module
from llama_mini.server.app import create_app
from llama_mini.server.settings import Settings
from tests.server.local import Client, sent

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SECONDS = 20.0  # after which a test that waits has failed


class Gate:
    """Lets the model run only so many forward passes as a test allows; `passes` have begun.

    Their times mean nothing then, so that prompts do not wait until steps had as much.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm, self._allowed = llm, threading.Semaphore(0)
        self.passes = 0

    def allow(self, n: int) -> None:
        self._allowed.release(n)

    def _wait(self, *_: object) -> None:
        self.passes += 1
        assert self._allowed.acquire(timeout=SECONDS)

    def __enter__(self) -> "Gate":
        self._hook = self._llm.model.tok_embeddings.register_forward_pre_hook(self._wait)
        return self

    def __exit__(self, *_: object) -> None:
        self.allow(10_000)
        self._hook.remove()


class Visitor:
    """A client of the app that posts a completion by hand, and may go away."""

    def __init__(self, app: Any, **body: Any) -> None:
        self.messages: list[dict[str, Any]] = []
        self._gone, self._body = asyncio.Event(), json.dumps(body).encode()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": TEXT, "query_string": b"", "headers": headers}
        scope |= {"http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1)}
        self._work = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        body, self._body = self._body, b""
        if body:
            return {"type": "http.request", "body": body}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    async def leave(self) -> None:
        self._gone.set()
        await self.reply()

    def cancel(self) -> None:
        self._work.cancel()

    async def reply(self) -> dict[str, Any] | None:
        await asyncio.wait_for(self._work, SECONDS)
        data = b"".join(message.get("body", b"") for message in self.messages)
        return json.loads(data) if data.startswith(b"{") else None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0)


@asynccontextmanager
async def gated(llm: LLM) -> AsyncIterator[tuple[Any, Gate]]:
    llm.forget()
    with Gate(llm) as gate:
        yield create_app(llm, Settings()), gate
        await until(lambda: not llm.activity().running and not llm.activity().waiting)


@pytest.mark.parametrize("stream", [True, False])
def test_the_requests_of_a_client_that_left_end_at_the_next_step(llm: LLM, stream: bool) -> None:
    async def run() -> int:
        async with gated(llm) as (app, gate):
            visitor = Visitor(app, prompt="abc", n=2, max_tokens=200, ignore_eos=True, stream=stream)
            gate.allow(6)
            await until(lambda: gate.passes == 7 and (len(visitor.messages) > 3 or not stream))
            await visitor.leave()
            gate.allow(500)
            await until(lambda: llm.activity().running == 0)
            return gate.passes

    assert asyncio.run(run()) <= 8


def test_a_client_that_leaves_in_the_queue_or_in_its_prefill(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits never starts; a prompt stops at its next part."""
    monkeypatch.setattr(runner_module, "MAX_ROWS", 1)
    monkeypatch.setattr(runner_module, "PREFILL_CHUNK", 32)

    async def run() -> None:
        async with gated(llm) as (app, gate):
            visitor = Visitor(app, prompt="abc", max_tokens=4, ignore_eos=True)
            await until(lambda: gate.passes == 1)
            waiting = [Visitor(app, prompt="xyz", max_tokens=200) for _ in range(3)]
            await until(lambda: llm.activity().waiting >= 0 and len(asyncio.all_tasks()) > 4)
            for other in waiting:
                await other.leave()
            gate.allow(50)
            assert (await visitor.reply())["usage"]["completion_tokens"] == 4
            assert gate.passes == 4
        async with gated(llm) as (app, gate):
            visitor = Visitor(app, prompt="x" * 400, max_tokens=4)
            gate.allow(2)
            await until(lambda: gate.passes == 3)
            await visitor.leave()
            gate.allow(50)
            await until(lambda: llm.activity().running == 0)
            assert gate.passes <= 4

    asyncio.run(run())


@pytest.fixture
def failing(llm: LLM) -> Iterator[None]:
    """The first of the running rows gets NaN, once ten steps were run."""
    steps = iter(range(1000))

    def fail(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        if next(steps) == 10:
            logits = logits.clone()
            logits[0] = float("nan")
        return logits

    hook = llm.model.lm_head.register_forward_hook(fail)
    yield
    hook.remove()


def test_an_error_in_a_stream_is_its_last_event(llm: LLM, failing: None) -> None:
    with Client(llm) as client:
        reply = client.http.post(TEXT, json={"prompt": "a", "stream": True, "max_tokens": 50, "ignore_eos": True})
        *events, last = sent(reply)
        assert reply.status_code == 200
        assert len(events) > 2
        assert last["error"]["type"] == "server_error"
        assert "NaN" in last["error"]["message"] or "finite" in last["error"]["message"]
        assert client.post(TEXT, prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_an_error_has_a_status_where_nothing_was_sent(llm: LLM, failing: None) -> None:
    with Client(llm) as client:
        error = client.refused(TEXT, 500, prompt="a", max_tokens=50, ignore_eos=True)
        assert error["type"] == "server_error"


def test_others_go_on_when_one_fails(llm: LLM, failing: None) -> None:
    async def run() -> None:
        async with gated(llm) as (app, gate):
            bad = Visitor(app, prompt="a", max_tokens=30, ignore_eos=True, temperature=0)
            await until(lambda: gate.passes == 1)
            good = Visitor(app, prompt="b", max_tokens=30, ignore_eos=True, temperature=0)
            gate.allow(1000)
            assert (await bad.reply())["error"]["type"] == "server_error"
            (choice,) = (await good.reply())["choices"]
        assert choice["text"] == llm.generate("b", max_tokens=30, ignore_eos=True)[0].text

    asyncio.run(run())


def test_too_many_answers(llm: LLM) -> None:
    with Client(llm, max_queue=2) as client:
        reply = client.http.post(TEXT, json={"prompt": ["a", "b", "c"], "max_tokens": 1})
        assert (reply.status_code, "retry-after" in reply.headers) == (400, False)  # it would never be taken
        error = reply.json()["error"]
        assert "3 answers are more than the 2 that may run and wait" in error["message"]
        assert (error["param"], client.refused(TEXT, prompt="a", n=3)["param"]) == ("prompt", "n")
        for _ in range(3):  # those that ended or were refused make room
            assert len(client.post(TEXT, prompt=["a", "b"], max_tokens=1)["choices"]) == 2
            client.refused(TEXT, prompt=["a", "b"], max_tokens=1000)


def test_answers_for_which_there_is_no_room_now(llm: LLM) -> None:
    async def run() -> None:
        async with gated(llm) as (_, gate):
            app = create_app(llm, Settings(max_queue=2))
            first = Visitor(app, prompt=["a", "b"], max_tokens=1)
            await until(lambda: gate.passes == 1)
            second = Visitor(app, prompt="c", max_tokens=1)
            assert "1 more answers than the 2 that run and wait" in (await second.reply())["error"]["message"]
            start = second.messages[0]
            assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
            gate.allow(10)
            assert len((await first.reply())["choices"]) == 2

    asyncio.run(run())


@pytest.mark.parametrize("late", [False, True])
def test_what_is_cancelled_while_it_starts_leaves_the_batch(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Before its requests are submitted, or after: nobody waits for them, and they take no room."""
    begun, submit, submitted, go_on = threading.Event(), llm.submit, [], threading.Event()

    def slow(*arguments: Any) -> Any:
        if late:
            submitted.append(submit(*arguments))
        begun.set()
        assert go_on.wait(SECONDS)
        if not late:
            submitted.append(submit(*arguments))
        return submitted[0]

    async def run() -> None:
        async with gated(llm) as (_, gate):
            app = create_app(llm, Settings(max_queue=2))
            monkeypatch.setattr(llm, "submit", slow)
            visitor = Visitor(app, prompt="a", n=2, max_tokens=400, ignore_eos=True)
            await until(begun.is_set)
            visitor.cancel()
            with pytest.raises(asyncio.CancelledError):
                await visitor.reply()
            monkeypatch.undo()
            go_on.set()
            await until(lambda: bool(submitted) and all(request.cancelled for request in submitted[0].requests))
            gate.allow(100)
            assert len((await Visitor(app, prompt="b", n=2, max_tokens=3).reply())["choices"]) == 2

    asyncio.run(run())
    assert [request.finish_reason for request in submitted[0].requests] == ["abort", "abort"]


def test_an_unforeseen_failure_tells_nothing_but_the_log(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(app_module, "text_request", fail)
    with Client(llm) as client:
        error = client.refused(TEXT, 500, prompt="a")
    assert (error["type"], error["message"]) == ("server_error", "the server failed: its log has the reason")
    assert "secret" in caplog.text


def test_a_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    def text(client: Client, seed: int | None) -> str:
        reply = client.post(TEXT, prompt="Once", temperature=1, seed=seed, max_tokens=20, ignore_eos=True)
        return reply["choices"][0]["text"]

    seeds = [3, None, 5, None, 3, 5, None, 3]
    with Client(llm) as client:
        alone = {seed: text(client, seed) for seed in (3, 5)}
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda seed: text(client, seed), seeds))
    assert [each for each, seed in zip(found, seeds, strict=True) if seed] == [alone[s] for s in seeds if s]
    assert len(set(found)) == 5
