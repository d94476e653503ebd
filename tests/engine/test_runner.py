"""How a runner shares its time among prompts and steps, by a clock that counts tokens."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest

from llama_mini import LLM
from llama_mini.engine import runner as runner_module
from llama_mini.engine.runner import LEAST_PREFILL, PREFILL_SECONDS

TOKEN, STEP = 2**-10, 2**-6  # seconds of a token of a prompt, and of a step


@pytest.fixture(autouse=True)
def clock(passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> float:
        return sum(STEP if n == 1 else TOKEN * n for _, n in passes)

    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=now))


def generate(tiny_dir, n: int, length: int) -> None:
    llm = LLM(tiny_dir, threads=1, speculation="off", prefix_cache=False)
    llm.generate([random.Random(i).choices(range(256), k=length) for i in range(n)], max_tokens=60, ignore_eos=True)


def test_prompts_have_their_time_between_any_two_steps_while_they_wait(tiny_dir, passes: list[tuple[int, int]]) -> None:
    generate(tiny_dir, 6, 300)
    steps = [i for i, (_, n) in enumerate(passes) if n == 1]
    end = max(i for i, (_, n) in enumerate(passes) if n > 1)
    between = [sum(n for _, n in passes[a + 1 : b]) * TOKEN for a, b in pairwise(steps) if b < end]
    assert max(between) <= PREFILL_SECONDS + TOKEN
    assert min(between[10:]) > 0.9 * PREFILL_SECONDS  # once the speed of prompts is known


def test_prompts_wait_for_one_step_otherwise_and_steps_never_long(tiny_dir, passes: list[tuple[int, int]]) -> None:
    generate(tiny_dir, 2, 300)
    assert passes[0] == (1, 300)
    alternating = passes[1 : passes.index((2, 1))]
    assert set(alternating[::2]) == {(1, 1)}
    parts = [n for _, n in alternating[1::2]]
    assert sum(parts) == 300
    assert min(parts[:-1]) >= LEAST_PREFILL
    assert max(parts) * TOKEN <= PREFILL_SECONDS + TOKEN
