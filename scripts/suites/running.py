"""Runs a suite and compares each test's outcome with the committed list."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llama_mini.errors import LlamaMiniError
from llama_mini.validate import join_names
from suites.sources import tests_of

if TYPE_CHECKING:
    import pytest

MODULES = ("jsonschema", "openai", "pytest_asyncio", "regex", "requests", "starlette", "transformers", "uvicorn")
SUITES = {"vllm": "suites.vllm", "llama.cpp": "suites.llamacpp"}
KINDS = ("theirs", "model", "otherwise")  # of reasons, in the list
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OUTCOMES = "SUITE_OUTCOMES"  # the file, by an environment variable, into which the plugin writes
TIMEOUT = 7200  # seconds, for a suite; each takes ten minutes on two idle cores
INI = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = ignore
markers = slow
    serial
"""


def outcomes_of(suite: str, only: str | None = None) -> dict[str, str]:
    """Every test of a suite, by its file and name: empty if it passed, else the last line of its error."""
    if missing := [name for name in MODULES if find_spec(name) is None]:
        do = "pip install -c constraints.txt -e '.[suites]'"
        raise LlamaMiniError(f"the suites need {join_names(missing)}, which is not installed: {do}")
    plugin = import_module(SUITES[suite])
    folder = tests_of(plugin.REQUIREMENT, plugin.SHA256, plugin.FOLDER)
    (folder.parent / "__init__.py").touch()  # vLLM's are a package of that name
    with tempfile.TemporaryDirectory() as work:
        ini, results = Path(work, "pytest.ini"), Path(work, "outcomes.jsonl")
        ini.write_text(INI)
        plugins = ["-p", SUITES[suite], "-p", "suites.running", "-p", "no:cacheprovider", "-p", "no:xdist"]
        words = ["-c", str(ini), "--rootdir", str(folder), "-q", *plugins, *plugin.FILES]
        path = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
        path += filter(None, [os.environ.get("PYTHONPATH")])  # an empty entry would be the folder, and its `openai`
        # the copies of the checkpoint go with the folder
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), OUTCOMES: str(results), "TMPDIR": work}
        command = [sys.executable, "-P", "-m", "pytest", *words, *(["-k", only] if only else [])]
        status, output = run_in_group(command, folder, environment, TIMEOUT)
        if status not in (0, 1):
            raise LlamaMiniError(f"pytest ended with status {status}:\n{output[-3000:]}")
        return dict(json.loads(line) for line in results.read_text().splitlines())


def run_in_group(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> tuple[int, str]:
    """A command's status and output. Whatever it started ends with it, also when this process is told to stop.

    Raises LlamaMiniError if it takes longer than `seconds`.
    """
    told: list[int] = []  # a signal between the start and `try` would leave it running
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in STOPS}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            for number, handler in before.items():
                signal.signal(number, handler)
            if told:
                raise KeyboardInterrupt
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise LlamaMiniError(f"the tests took longer than {seconds:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output


def pytest_runtest_logreport(report: "pytest.TestReport") -> None:
    """As a plugin: one line of JSON for each test that ran."""
    if report.skipped or (report.when != "call" and report.passed):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = "" if report.passed else f"{getattr(crash, 'message', report.longrepr)}".strip().splitlines()[0][:200]
    with Path(os.environ[OUTCOMES]).open("a") as lines:
        print(json.dumps([report.nodeid, message]), file=lines)


@dataclass(frozen=True)
class Listed:
    """The committed outcomes of a suite: what passes, what fails, by the kind of the reason, and what does either."""

    passes: list[str]
    fails: dict[str, dict[str, str]]
    either: dict[str, str] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, str]:
        """The reason of each test that fails."""
        return {test: reason for kind in self.fails.values() for test, reason in kind.items()}


def read_list(file: Path, suite: str) -> Listed:
    return Listed(**tomllib.loads(file.read_text(encoding="utf-8"))[suite])


def differences(outcomes: Mapping[str, str], listed: Listed, is_part: bool = False) -> list[str]:
    """A line for each test whose outcome is not the listed one, or that is listed and did not run.

    is_part: only some of the tests were to run.
    """
    lines, fails = [], listed.reasons
    for test, error in outcomes.items():
        if test in listed.either:
            continue
        if error and test not in fails:
            lines.append(f"{test} {'fails' if test in listed.passes else 'is not listed, and fails'}: {error}")
        if not error and test not in listed.passes:
            known = "is listed among those that fail" if test in fails else "is not listed"
            lines.append(f"{test} {known}; it passes")
    known_tests = [*listed.passes, *fails, *listed.either]
    return lines + [f"{test} is listed and did not run" for test in known_tests if test not in outcomes and not is_part]
