"""The operators' threads on a busy machine: the same work, and no slower than one thread by much."""

import statistics
import sys
import time
from contextlib import ExitStack

import pytest
import torch

from tests.processes import child


@pytest.mark.clock
def test_two_threads_do_not_wait_for_cores_that_others_use() -> None:
    """Two threads would reach 2 % of the speed of one; the bound leaves room for trials in so short a time."""
    x, w, no_bias = torch.ones(1, 1, 1024), [torch.ones(1024, 1024)], torch.empty(0)

    def speed(threads: int, seconds: float = 0.1) -> float:
        torch.set_num_threads(threads)
        begin, n = time.perf_counter(), 0
        while (now := time.perf_counter()) - begin < seconds:
            torch.ops.llama_mini.gemv(x, w, no_bias, 1024)
            n += 1
        return n / (now - begin)

    with ExitStack() as busy:
        for _ in range(4):
            busy.enter_context(child(sys.executable, "-c", "while True: pass"))
        ratios = [speed(2) / speed(1) for _ in range(7)]
    assert statistics.median(ratios) > 0.2
