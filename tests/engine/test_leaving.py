"""A request whose caller goes away leaves the running batch: a stream closed or collected, a task cancelled, Ctrl-C."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_mini import LLM, SamplingParams
from llama_mini.engine import runner as runner_module
from llama_mini.engine.runner import Runner
from llama_mini.engine.scheduler import Call
from tests.engine.test_scheduler import LONG, alone, prompt_of


@pytest.fixture(scope="module")
def llm(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="bfloat16", threads=1)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def closed(llm: LLM) -> Iterator[None]:
    stream = llm.stream([5], LONG)
    next(stream)
    yield
    stream.close()


def left_by_break(llm: LLM) -> Iterator[None]:
    for _ in llm.stream([5], LONG):
        break
    yield


def collected(llm: LLM) -> Iterator[None]:
    stream = llm.stream([5], LONG)
    next(stream)
    yield
    del stream
    gc.collect()


def completions_left(llm: LLM) -> Iterator[None]:
    completions = llm.completions([[5]] * 50, [SamplingParams(max_tokens=1), *[LONG] * 49])
    next(completions)
    yield
    completions.close()


def interrupted(llm: LLM) -> Iterator[None]:
    yield
    try:
        for _ in llm.stream([5], LONG):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def task_cancelled(llm: LLM) -> Iterator[None]:
    async def stream(runs: asyncio.Event) -> None:
        async for _ in llm.astream([5], LONG):
            runs.set()

    async def cancel() -> None:
        runs = asyncio.Event()
        task = asyncio.create_task(stream(runs))
        await runs.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    yield
    asyncio.run(cancel())


def loop_closed(llm: LLM) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    stream = llm.astream([5], LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    yield


LEFT = [closed, left_by_break, collected, completions_left, interrupted, task_cancelled, loop_closed]


@pytest.mark.parametrize("leave", LEFT)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_nobody_waits_for_leaves_the_batch(
    llm: LLM, leave: Callable[[LLM], Iterator[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, release = [], Runner._release
    monkeypatch.setattr(Runner, "_release", lambda self, request: left.append(request) or release(self, request))
    llm.generate([6], max_tokens=1)
    runner = llm._scheduler._runner
    assert runner is not None
    other = llm.stream(prompt_of(9, 6), LONG)
    next(other)
    for _ in leave(llm):
        pass
    until(lambda: len(runner._running) <= 1 and not runner.waiting and any(r.prompt == [5] for r in left))
    assert max(len(request.token_ids) for request in left if request.prompt == [5]) < LONG.max_tokens
    ids = [chunk.token_id for chunk in other]
    assert ids == alone(llm, prompt_of(9, 6), LONG).token_ids[1:]
    until(lambda: runner.idle)


def test_what_waits_leaves_the_queue_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a place in the batch is free, and without having run."""
    monkeypatch.setattr(runner_module, "MAX_ROWS", 1)
    running = llm.stream([6], LONG)
    next(running)
    runner = llm._scheduler._runner
    assert runner is not None
    with Call(llm._scheduler) as call:
        call.submit(llm._requests([5], LONG))
        until(lambda: len(runner.waiting) == 1)
    until(lambda: not runner.waiting)
    assert len(runner._running) == 1
    running.close()
    until(lambda: runner.idle)


def test_forgetting_frees_what_was_just_left(llm: LLM) -> None:
    """Before a step could end it."""
    stream = llm.stream([5], LONG)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        with llm.exclusive():
            forgotten = pool.submit(llm.forget)
            until(lambda: llm._scheduler._inbox.qsize() == 1)
            stream.close()
        forgotten.result()
    assert llm._scheduler._runner is None
