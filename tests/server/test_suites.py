"""scripts/server_suites.py: outcomes against the committed list. The suites take ten minutes each: run the script."""

import sys

import pytest

import server_suites
from suites.running import SUITES, Listed, differences, read_list

LISTED = Listed(passes=["a", "b"], fails={"c": "not ours", "d": "not ours"}, either={"e": "the model's choice"})
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
    names = [*listed.passes, *listed.fails, *listed.either]
    assert len(set(names)) == len(names) > 40
    assert min(map(len, [*listed.fails.values(), *listed.either.values()])) > 10


def test_an_unknown_suite_is_an_error_that_lists_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server_suites.py", "sglang"])
    assert server_suites.main() == 2
    assert capsys.readouterr().err == "error: unknown suite 'sglang'; known: vllm, llama.cpp\n"
