"""Checks of settings: what passes, and what the message says of what does not."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from llama_mini.errors import ConfigError, LlamaMiniError, RequestError
from llama_mini.validate import (
    as_plain,
    check_choice,
    check_flag,
    check_number,
    check_token_ids,
    check_whole,
    join_names,
    short_repr,
)

HUGE = 10**400


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0, {}, "n must be a whole number of at least 1, not 0"),
        (True, {}, "n must be a whole number of at least 1, not True"),
        (2.0, {}, "n must be a whole number of at least 1, not 2.0"),
        (9, {"minimum": 2, "maximum": 8}, "n must be a whole number from 2 to 8, not 9"),
        (9, {"maximum": 8, "why": ", the context"}, "n must be a whole number from 1 to 8, the context, not 9"),
        (HUGE, {"maximum": 8}, "n must be a whole number from 1 to 8, not a number of 1329 bits"),
    ],
)
def test_a_whole_number(value: Any, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_whole("n", value, ConfigError, **limits)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (math.nan, {}, "p must be a finite number, not nan"),
        ("1", {}, "p must be a finite number, not '1'"),
        (HUGE, {}, "p must be a finite number, not a number of 1329 bits"),
        (-0.5, {"minimum": 0}, "p must be a finite number of at least 0, not -0.5"),
        (1.5, {"minimum": 0, "maximum": 1}, "p must be a finite number from 0 to 1, not 1.5"),
        (0, {"above": 0}, "p must be a finite number above 0, not 0"),
    ],
)
def test_a_number(value: Any, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_number("p", value, RequestError, **limits)
    assert str(caught.value) == message


def test_what_passes() -> None:
    check_whole("n", 1, ConfigError)
    check_whole("n", 10**30, ConfigError)
    check_number("p", 0, ConfigError, minimum=0, maximum=1)
    check_number("p", 1.0, ConfigError, minimum=0, maximum=1)
    check_number("p", 1e-300, ConfigError, above=0)
    check_flag("f", False, ConfigError)
    check_choice("kind", "a", ("a", "b"), ConfigError)
    check_token_ids([0, 98], 99, ConfigError)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_flag("f", 1, ConfigError), "f must be true or false, not 1"),
        (lambda: check_choice("kind", "c", ("a", "b"), ConfigError), "unknown kind 'c'; known: a, b"),
        (lambda: check_choice("kind", ["a"], ("a", "b"), ConfigError), "unknown kind ['a']; known: a, b"),
        (lambda: check_token_ids([1, 99], 99, ConfigError), "token id 99 is outside the vocabulary of 99"),
        (lambda: check_token_ids([-1], 99, ConfigError), "token id -1 is outside the vocabulary of 99"),
        (lambda: check_token_ids([10**5000], 9, ConfigError), "token id a number of 16610 bits is outside"),
    ],
)
def test_other_checks(check: Any, message: str) -> None:
    with pytest.raises(LlamaMiniError) as caught:
        check()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", [np.int64(3), np.array(3), torch.tensor(3), np.float32(0.5), np.True_, np.str_("a")])
def test_a_number_of_a_library_becomes_a_plain_one(value: Any) -> None:
    assert as_plain(value) == value.tolist()
    assert type(as_plain(value)) in (int, float, bool, str)
    assert as_plain([value]) == [value]
    assert as_plain(np.array([[1, 2]])) == [[1, 2]]


def test_values_and_names_are_cut_short() -> None:
    assert short_repr("a'b") == '"a\'b"'
    assert short_repr("x" * 79) == "'" + "x" * 76 + "..."
    assert short_repr("x" * 10**7) == short_repr("x" * 90)
    assert short_repr([10**5000]) == "a list"
    assert join_names(range(3)) == "0, 1, 2"
    assert join_names(range(14)) == ", ".join(map(str, range(12))) + " and 2 more"
    assert join_names(["x" * 200]) == "x" * 157 + "..."
