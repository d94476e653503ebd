"""scripts/server_suites.py: outcomes against the committed list. The suites take ten minutes each: run the script."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import server_suites
from llama_mini import server
from llama_mini.errors import LlamaMiniError
from suites import running
from suites.running import KINDS, SUITES, Listed, differences, read_list

FAILS = {"theirs": {"c": "not ours"}, "model": {"d": "another one"}}
LISTED = Listed(passes=["a", "b"], fails=FAILS, either={"e": "the model's choice"})
AS_LISTED = {"a": "", "b": "", "c": "error", "d": "error", "e": ""}


def test_outcomes_as_listed_differ_in_nothing() -> None:
    assert differences(AS_LISTED, LISTED) == []
    assert differences(AS_LISTED | {"e": "error"}, LISTED) == []
    assert differences({"a": ""}, LISTED, is_part=True) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"a": "KeyError"}, "a fails: KeyError"),
        ({"c": ""}, "c is listed among those that fail; it passes"),
        ({"f": ""}, "f is not listed; it passes"),
        ({"f": "KeyError"}, "f is not listed, and fails: KeyError"),
    ],
)
def test_each_difference_is_a_line(changed: dict[str, str], line: str) -> None:
    assert differences(AS_LISTED | changed, LISTED) == [line]


def test_a_listed_test_must_run() -> None:
    assert differences({test: AS_LISTED[test] for test in "abde"}, LISTED) == ["c is listed and did not run"]


@pytest.mark.parametrize("suite", SUITES)
def test_the_list_names_each_test_once_and_gives_a_reason_for_each_that_fails(suite: str) -> None:
    listed = read_list(server_suites.LIST, suite)
    names = [*listed.passes, *listed.reasons, *listed.either]
    assert len(set(names)) == len(names) > 40
    assert min(map(len, [*listed.reasons.values(), *listed.either.values()])) > 10


def test_the_readme_has_the_numbers_of_the_list() -> None:
    readme = Path(server.__file__).with_name("README.md").read_text(encoding="utf-8")
    numbers = []
    for suite in SUITES:
        listed = read_list(server_suites.LIST, suite)
        parts = [*map(len, (listed.passes, *(listed.fails.pop(kind) for kind in KINDS), listed.either))]
        assert not listed.fails
        numbers.append([sum(parts), *parts])
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \|$", readme, re.MULTILINE)
    assert [[int(number) for number in column] for column in zip(*rows, strict=True)] == numbers


def test_an_unknown_suite_is_an_error_that_lists_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server_suites.py", "vllm", "sglang"])
    monkeypatch.setattr(running, "outcomes_of", None)  # nothing runs before
    assert server_suites.main() == 2
    assert capsys.readouterr().err == "error: unknown suite 'sglang'; known: vllm, llama.cpp\n"


def test_without_its_libraries_the_script_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "MODULES", ("json", "no_such_library", "nor_this"))
    with pytest.raises(LlamaMiniError, match=r"need no_such_library, nor_this, .* pip install .*'\.\[suites\]'$"):
        running.outcomes_of("vllm")


STARTS_ANOTHER = "sleep 60 > /dev/null 2>&1 & echo $! > started; "


@pytest.fixture
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in running.STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(folder: Path) -> bool:
    """Whether the process whose number stands in `started` ends soon."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(int((folder / "started").read_text()))
        for _ in range(500):
            if process.status() == psutil.STATUS_ZOMBIE:  # until somebody asks how it ended
                break
            time.sleep(0.01)
        else:
            return False
    return True


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT"])
@pytest.mark.usefixtures("_signals")
def test_a_script_that_is_told_to_stop_leaves_no_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sh", "-c", f"{STARTS_ANOTHER} kill -{name} $PPID; wait"]
    monkeypatch.setattr(running, "outcomes_of", lambda *_: running.run_in_group(command, tmp_path, os.environ, 60))
    monkeypatch.setattr(sys, "argv", ["server_suites.py", "vllm"])
    assert server_suites.main() == 130
    assert ended(tmp_path)


@pytest.mark.parametrize(("end", "status"), [("exit 7", 7), ("wait", None)])
def test_what_a_suite_has_started_ends_with_it(end: str, status: int | None, tmp_path: Path) -> None:
    command = ["sh", "-c", f"{STARTS_ANOTHER} echo out; {end}"]
    if status is None:
        with pytest.raises(LlamaMiniError, match=r"longer than 0\.2 s"):
            running.run_in_group(command, tmp_path, os.environ, 0.2)
    else:
        assert running.run_in_group(command, tmp_path, os.environ, 60) == (status, "out\n")
    assert ended(tmp_path)


def test_modules_do_not_come_from_the_folder_of_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's has an `openai`, and an empty entry of PYTHONPATH is the current folder."""
    seen: dict[str, str] = {}

    def run(command: object, folder: object, environment: dict[str, str], seconds: object) -> tuple[int, str]:
        seen.update(environment)
        Path(environment[running.OUTCOMES]).touch()
        return 0, ""

    monkeypatch.delenv("PYTHONPATH", raising=False)
    plugin = SimpleNamespace(REQUIREMENT="", SHA256="", FOLDER="", FILES=[])
    for name, fake in {
        "MODULES": (),
        "import_module": lambda _: plugin,
        "tests_of": lambda *_: tmp_path / "tests",
    }.items():
        monkeypatch.setattr(running, name, fake)
    monkeypatch.setattr(running, "run_in_group", run)
    assert running.outcomes_of("vllm") == {}
    assert "" not in seen["PYTHONPATH"].split(os.pathsep)
