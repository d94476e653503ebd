"""How a runner shares its time among prompts and steps, by a clock that counts tokens."""

import math
import random
from types import SimpleNamespace

import pytest
from torch import Tensor

from llama_mini import LLM
from llama_mini.engine import runner as runner_module
from llama_mini.engine.runner import LEAST_PREFILL, PREFILL_SECONDS, Runner

TOKEN, STEP = 2**-10, 2**-6  # seconds of a token of a prompt, and of a step


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens of each) of the forward passes: a step has one token a row, a part of a prompt more, in one row."""
    seen, clock, hidden = list[tuple[int, int]](), [0.0], Runner._hidden

    def timed(self: Runner, tokens: Tensor, *rest: object) -> Tensor:
        seen.append(tuple(tokens.shape))
        clock[0] += STEP if tokens.shape[1] == 1 else TOKEN * tokens.shape[1]
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(Runner, "_hidden", timed)
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return seen


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
