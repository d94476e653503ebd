"""Engines in processes of their own, run in turn, and a watch over what else uses the machine meanwhile."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import psutil

from llama_mini.errors import LlamaMiniError

Value = TypeVar("Value")
# A round is disturbed when other programs take more of the processors' time than this share, and this many seconds: the
# system counts time in ticks.
SHARE, TICKS = 0.05, 0.04


class Watch:
    """Notices processor time that went neither to the run being timed nor to this process."""

    def __init__(self) -> None:
        self.disturbed = False
        self.rounds = self.repeated = self.disturbed_rounds = 0

    def begin(self) -> None:
        self._busy, self._wall, self._own = _busy(), time.perf_counter(), time.process_time()

    def end(self, cpu: float) -> None:
        """`cpu`: processor seconds of the run itself, on all its threads."""
        wall = time.perf_counter() - self._wall
        other = _busy() - self._busy - cpu - (time.process_time() - self._own)
        self.disturbed |= other > SHARE * wall * (os.cpu_count() or 1) + TICKS


class Child:
    """A worker in a process of its own. Raises LlamaMiniError with the last line of its errors if the process ends."""

    def __init__(self, watch: Watch, worker: str, *arguments: Any) -> None:
        self._watch, self._name = watch, worker
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.child", worker, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment(),
        )
        try:
            self._answer()
        except LlamaMiniError:
            self.close()
            raise

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the worker. Nothing else of the bench runs meanwhile."""
        assert self._process.stdin is not None
        self._watch.begin()
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer raises with its last line
        result, cpu = self._answer()
        self._watch.end(cpu)
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise LlamaMiniError(f"{self._name} ended with status {self._process.returncode}: {lines[-1]:.300}")
        return json.loads(line)


def first_byte(watch: Watch, command: Sequence[str]) -> float:
    """Seconds from starting a process to the first byte that it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    watch.begin()
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environment()
    ) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not byte:
        raise LlamaMiniError(
            f"{' '.join(command)!s:.200} ended with status {process.returncode}: run it by hand to see why"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    watch.end(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return seconds


def in_rounds(
    watch: Watch,
    runs: Mapping[str, Callable[[int], Value]],
    repeats: int,
    tries: int,
    turns: Iterator[int] | None = None,
) -> dict[str, list[Value]]:
    """Calls every run once a round, in turn, and collects their values; one round before these warms up.

    A run gets a number that is new in each round. A round that other programs disturbed is repeated, up to `tries`
    times in all; the last is kept as it is. turns: the numbers, for runs that are warm already.
    """
    values: dict[str, list[Value]] = {name: [] for name in runs}
    first, turns = (-1, count()) if turns is None else (0, turns)
    for number in range(first, repeats):
        for attempt in range(tries):
            watch.disturbed = False
            turn = next(turns)  # in a repeated round too: an engine may keep what it has read
            taken = {name: run(turn) for name, run in runs.items()}
            if not watch.disturbed or number < 0:
                break
            watch.repeated += attempt + 1 < tries
        if number >= 0:
            watch.rounds += 1
            watch.disturbed_rounds += watch.disturbed
            for name, value in taken.items():
                values[name].append(value)
    return values


def _busy() -> float:
    """Seconds that all processors were busy, or taken by another virtual machine (`steal`)."""
    times = psutil.cpu_times()
    fields = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, field, 0.0) for field in fields)


def environment() -> dict[str, str]:
    """This process's, less settings that change the threads of some engines only; `benchmark` can be imported."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = [str(Path(__file__).parents[1]), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path)}
