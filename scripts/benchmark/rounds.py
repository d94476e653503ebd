"""Children that hold one engine each, taken in turn, and a watch over what else uses the machine meanwhile."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import psutil

from llama_mini.errors import LlamaMiniError

Value = TypeVar("Value")
SHARE, TICKS = 0.05, 0.04  # of the processors' time that others may take, and seconds that counting in ticks is off


class Watch:
    """Seconds of processor time that went neither to the run being timed nor to this process."""

    def __init__(self) -> None:
        self.disturbed = False
        self.runs = self.again = self.kept = 0

    def begin(self) -> None:
        self._busy, self._wall, self._own = _busy(), time.perf_counter(), time.process_time()

    def end(self, cpu: float) -> None:
        """`cpu`: seconds that the run itself took, on all its threads."""
        wall = time.perf_counter() - self._wall
        other = _busy() - self._busy - cpu - (time.process_time() - self._own)
        self.disturbed |= other > SHARE * wall * (os.cpu_count() or 1) + TICKS


class Child:
    """A worker in a process of its own. Raises LlamaMiniError with its last words where it ends."""

    def __init__(self, watch: Watch, worker: str, *arguments: Any) -> None:
        self._watch, self._name = watch, worker
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.child", worker, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=_environment(),
        )
        try:
            self._answer()
        except LlamaMiniError:
            self.close()
            raise

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Runs a method of the worker while nothing else of the bench does."""
        assert self._process.stdin is not None
        self._watch.begin()
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        result, cpu = self._answer()
        self._watch.end(cpu)
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._words.seek(0)
            words = self._words.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise LlamaMiniError(f"{self._name} ended with status {self._process.returncode}: {words[-1]:.300}")
        return json.loads(line)


def first_byte(watch: Watch, command: Sequence[str]) -> float:
    """Seconds from starting a process to the first byte that it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    watch.begin()
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=_environment()
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
    watch: Watch, runs: Mapping[str, Callable[[int], Value]], repeats: int, tries: int
) -> dict[str, list[Value]]:
    """Every run once a round, in turn, after one round to warm up; each gets the turn's number and gives a value.

    A round that other load disturbed is taken again, up to `tries` times in all; the last is kept as it is.
    """
    values: dict[str, list[Value]] = {name: [] for name in runs}
    turns = count()
    for number in range(-1, repeats):
        for attempt in range(tries):
            watch.disturbed = False
            turn = next(turns)  # another text each time: an engine may keep what it has read
            taken = {name: run(turn) for name, run in runs.items()}
            if not watch.disturbed or number < 0:
                break
            watch.again += attempt + 1 < tries
        if number >= 0:
            watch.runs += 1
            watch.kept += watch.disturbed
            for name, value in taken.items():
                values[name].append(value)
    return values


def _busy() -> float:
    """Seconds that all processors were busy, or taken by another machine; a guest's are in the user's already."""
    times = psutil.cpu_times()
    fields = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, field, 0.0) for field in fields)


def _environment() -> dict[str, str]:
    """Without settings that would change the threads of one engine and not of another; `benchmark` can be imported."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = [str(Path(__file__).parents[1]), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path)}
