"""How a runner shares its time among prompts and steps, by a clock that counts tokens."""

import math
import random
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


def test_prompts_get_half_of_the_time_while_more_wait_than_run(tiny_dir, passes: list[tuple[int, int]]) -> None:
    generate(tiny_dir, 4, 64)
    assert passes[:5] == [(1, 64), *[(1, 1)] * 4]  # 64 tokens take as long as four steps
    (_, n), *after = passes[5:]
    n_steps = math.ceil(n * TOKEN / STEP)
    assert LEAST_PREFILL <= n < 64
    assert after[:n_steps] == [(1, 1)] * n_steps
    assert after[n_steps] == (1, 64 - n)


def test_prompts_wait_for_one_step_otherwise_and_steps_never_long(tiny_dir, passes: list[tuple[int, int]]) -> None:
    generate(tiny_dir, 2, 300)
    assert passes[0] == (1, 300)
    alternating = passes[1 : passes.index((2, 1))]
    assert set(alternating[::2]) == {(1, 1)}
    parts = [n for _, n in alternating[1::2]]
    assert sum(parts) == 300
    assert min(parts[:-1]) >= LEAST_PREFILL
    assert max(parts) * TOKEN <= PREFILL_SECONDS + TOKEN
