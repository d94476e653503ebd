"""Requests of an event loop: started from any thread, awaited without blocking, cancelled when they are left."""

import asyncio
from pathlib import Path

import pytest

from llama_mini import LLM
from llama_mini.errors import ContextError, RequestError


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, dtype="float32", kernels="off", threads=1)


def test_chunks_are_those_of_generate(llm: LLM) -> None:
    """Started in another thread, as a server does, so that a long prompt does not hold up the loop."""
    settings = {"n": 2, "seed": 1, "temperature": 1.0, "max_tokens": 9}

    async def run() -> dict[int, str]:
        loop, texts = asyncio.get_running_loop(), dict[int, str]()
        call = await asyncio.to_thread(
            llm.submit, ["a", "b"], {"n": 2, "seed": 1, "temperature": 1.0}, loop, max_tokens=9
        )
        numbers = {request: i for i, request in enumerate(call.requests)}
        with call:
            while call.n_open:
                for request, chunk in await call.next():
                    i = numbers[request]
                    texts[i] = texts.get(i, "") + chunk.text
        return texts

    expected = llm.generate(["a", "b"], settings)
    assert asyncio.run(run()) == {i: completion.text for i, completion in enumerate(expected)}


def test_leaving_cancels(llm: LLM) -> None:
    async def run() -> None:
        with llm.submit(["a", "b"], max_tokens=400, ignore_eos=True) as call:
            await call.next()
        async with asyncio.timeout(20):
            while llm.activity().running:
                await asyncio.sleep(0)
        assert [request.finish_reason for request in call.requests] == ["abort", "abort"]

    asyncio.run(run())


def test_what_a_hook_raises_comes_to_the_caller(llm: LLM) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        with llm.submit("a", max_tokens=5) as call:
            while call.n_open:
                await call.next()

    hook = llm.model.lm_head.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())
    hook.remove()
    asyncio.run(run())


def test_wrong_requests_are_refused_before_anything_runs(llm: LLM) -> None:
    async def run() -> None:
        with pytest.raises(ContextError, match="2 prompt tokens and 600 new ones exceed the context of 512"):
            llm.submit("a", max_tokens=600)
        with pytest.raises(RequestError, match="temperature"):
            llm.submit("a", temperature=-1)

    asyncio.run(run())
