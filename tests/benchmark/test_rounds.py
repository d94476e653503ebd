"""Engines that run in turn, and what counts as disturbed by other programs."""

import sys

import pytest

from benchmark import rounds
from benchmark.rounds import Child, Watch, first_byte, in_rounds
from llama_mini.errors import LlamaMiniError


def test_runs_alternate_after_one_round_to_warm_up() -> None:
    order: list[tuple[str, int]] = []

    def run(name: str, number: int) -> int:
        order.append((name, number))
        return len(order)

    watch = Watch()
    values = in_rounds(watch, {"a": lambda n: run("a", n), "b": lambda n: run("b", n)}, repeats=2, tries=3)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert values == {"a": [3, 5], "b": [4, 6]}
    assert (watch.rounds, watch.repeated, watch.disturbed_rounds) == (2, 0, 0)


def test_warm_runs_begin_with_the_first_round_and_the_turns_that_are_given() -> None:
    turns = iter(range(7, 20))
    for expected in ([7, 8], [9, 10]):
        assert in_rounds(Watch(), {"a": lambda turn: turn}, repeats=2, tries=1, turns=turns) == {"a": expected}


@pytest.mark.parametrize(
    ("disturbed", "repeated", "kept", "value"), [([1, 0], 1, 0, 2), ([1, 1, 0], 2, 0, 3), ([1, 1, 1], 2, 1, 3)]
)
def test_a_disturbed_round_is_repeated_and_counted(disturbed: list[int], repeated: int, kept: int, value: int) -> None:
    watch, calls = Watch(), [0]

    def run(_: int) -> int:
        if calls[0]:  # the first one warms up
            watch.disturbed = bool(disturbed[calls[0] - 1])
        calls[0] += 1
        return calls[0] - 1

    assert in_rounds(watch, {"a": run}, repeats=1, tries=3) == {"a": [value]}
    assert (watch.rounds, watch.repeated, watch.disturbed_rounds) == (1, repeated, kept)


@pytest.mark.parametrize(("busy", "cpu", "disturbed"), [(8.0, 8.0, False), (8.0, 2.0, True), (0.2, 0.2, False)])
def test_what_others_take_disturbs(busy: float, cpu: float, disturbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, wall = Watch(), iter([100.0, 104.0])
    spent = iter([50.0, 50.0 + busy])
    monkeypatch.setattr(rounds, "_busy", lambda: next(spent))
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(wall))
    watch.begin()
    watch.end(cpu)
    assert watch.disturbed == disturbed


def test_busy_time_of_the_machine_grows_with_work() -> None:
    before = rounds._busy()
    sum(i * i for i in range(3_000_000))
    assert rounds._busy() > before


def test_a_child_answers_and_what_libraries_print_is_no_answer() -> None:
    with Child(Watch(), "ours.Reader", 1) as child:
        assert 0 < child("memory", 80_000) < 5
        assert child("file", __file__) > 0


def test_a_child_that_cannot_start_leaves_its_last_line() -> None:
    with pytest.raises(LlamaMiniError, match=r"peers\.Files ended with status 1: TypeError: .*takes no arguments"):
        Child(Watch(), "peers.Files", "an argument")


def test_a_child_that_fails_in_a_call_leaves_its_last_line() -> None:
    with Child(Watch(), "peers.Files") as child, pytest.raises(LlamaMiniError, match=r"AttributeError: .*no_method"):
        child("no_method")


@pytest.mark.slow
def test_the_time_to_the_first_byte_ends_with_it() -> None:
    slow = "import sys; print('x', flush=True); sys.stdin.read(); sum(range(60_000_000))"
    whole = "import sys; sum(range(60_000_000)); print('x')"
    assert first_byte(Watch(), [sys.executable, "-c", slow]) < first_byte(Watch(), [sys.executable, "-c", whole])


@pytest.mark.parametrize("script", ["pass", "import sys; print('x'); sys.exit(3)"])
def test_a_process_that_fails_has_no_time(script: str) -> None:
    with pytest.raises(LlamaMiniError, match="run it by hand"):
        first_byte(Watch(), [sys.executable, "-c", script])
