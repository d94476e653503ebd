"""Runs a suite and compares each test's outcome with the committed list."""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

from llama_mini.errors import LlamaMiniError
from suites.sources import tests_of

SUITES = {"vllm": "suites.vllm", "llama.cpp": "suites.llamacpp"}
OUTCOMES = "SUITE_OUTCOMES"  # the file, by an environment variable, into which the plugin writes
TIMEOUT = 1800
INI = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = ignore
markers = slow
    serial
"""


def outcomes_of(suite: str, only: str | None = None) -> dict[str, str]:
    """Every test of a suite, by its file and name: empty if it passed, else the last line of its error."""
    plugin = import_module(SUITES[suite])
    folder = tests_of(plugin.REQUIREMENT, plugin.SHA256, plugin.FOLDER)
    (folder.parent / "__init__.py").touch()  # vLLM's are a package of that name
    with tempfile.TemporaryDirectory() as work:
        ini, results = Path(work, "pytest.ini"), Path(work, "outcomes.jsonl")
        ini.write_text(INI)
        plugins = ["-p", SUITES[suite], "-p", "suites.running", "-p", "no:cacheprovider", "-p", "no:xdist"]
        words = ["-c", str(ini), "--rootdir", str(folder), "-q", *plugins, *plugin.FILES]
        path = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), OUTCOMES: str(results)}
        command = [sys.executable, "-P", "-m", "pytest", *words, *(["-k", only] if only else [])]
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        if ran.returncode not in (0, 1):
            raise LlamaMiniError(f"pytest ended with status {ran.returncode}:\n{(ran.stdout + ran.stderr)[-3000:]}")
        return dict(json.loads(line) for line in results.read_text().splitlines())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plugin: one line of JSON for each test that ran."""
    if report.skipped or (report.when != "call" and report.passed):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = "" if report.passed else f"{getattr(crash, 'message', report.longrepr)}".strip().splitlines()[0][:200]
    with Path(os.environ[OUTCOMES]).open("a") as lines:
        print(json.dumps([report.nodeid, message]), file=lines)


@dataclass(frozen=True)
class Listed:
    """The committed outcomes of a suite: what passes, what fails, and what does either, with the reasons."""

    passes: list[str]
    fails: dict[str, str]
    either: dict[str, str] = field(default_factory=dict)


def read_list(file: Path, suite: str) -> Listed:
    return Listed(**tomllib.loads(file.read_text(encoding="utf-8"))[suite])


def differences(outcomes: Mapping[str, str], listed: Listed, is_part: bool = False) -> list[str]:
    """A line for each test whose outcome is not the listed one, or that is listed and did not run.

    is_part: only some of the tests were to run.
    """
    lines = []
    for test, error in outcomes.items():
        if test in listed.either:
            continue
        if error and test not in listed.fails:
            lines.append(f"{test} {'fails' if test in listed.passes else 'is not listed, and fails'}: {error}")
        if not error and test not in listed.passes:
            known = "is listed among those that fail" if test in listed.fails else "is not listed"
            lines.append(f"{test} {known}; it passes")
    known_tests = [*listed.passes, *listed.fails, *listed.either]
    return lines + [f"{test} is listed and did not run" for test in known_tests if test not in outcomes and not is_part]
