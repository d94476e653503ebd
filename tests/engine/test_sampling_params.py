"""What SamplingParams takes, what it refuses and by which name, and that it stays as it was made."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from llama_mini import SamplingParams
from llama_mini.engine.sampling_params import check_vocab
from llama_mini.errors import RequestError
from llama_mini.validate import short_repr

NUMBERS = {
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
WHOLE = {
    "top_k": (0, math.inf),
    "n": (1, 16384),
    "seed": (0, 2**64 - 1),
    "min_tokens": (0, math.inf),
    "max_tokens": (1, math.inf),
    "top_logprobs": (0, 1000),
}
POSITIVE = ["repetition_penalty", "max_time"]
NO_NUMBER = [True, "1", math.nan, math.inf, -math.inf, [1], {1: 1}, 1j, torch.tensor([1.0, 2.0])]
HUGE = 10**400  # no float holds it
NO_FLAG = [0, 1, None, "yes", 1.0]
OPTIONAL = {"seed", "max_tokens", "max_time"}


def wrong_values() -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, (low, high) in NUMBERS.items():
        pairs += [(name, value) for value in [*NO_NUMBER, HUGE, None, low - 0.1]]
        pairs += [(name, high + 0.1)] if high < math.inf else []
    for name, (low, high) in WHOLE.items():
        pairs += [(name, value) for value in [*NO_NUMBER, 1.0, low - 1]]
        pairs += [(name, high + 1)] if high < math.inf else []
        pairs += [] if name in OPTIONAL else [(name, None)]
    for name in POSITIVE:
        pairs += [(name, value) for value in [*NO_NUMBER, HUGE, 0, -0.5]]
        pairs += [] if name in OPTIONAL else [(name, None)]
    for name in ("ignore_eos", "prompt_logprobs"):
        pairs += [(name, value) for value in NO_FLAG]
    for value in ("", ["a", 3], ["a", ""], [["a"]], 5, {"a"}, None, b"a"):
        pairs.append(("stop", value))
    for value in (5, "5", b"5", [-1], [True], [1.0], ["1"], [[1]], {1}, None, [None]):
        pairs.append(("stop_token_ids", value))
    for value in ([(1, 2)], 5, "a", {-1: 0.0}, {True: 1.0}, {"1": 1.0}, {1.0: 1.0}, {(1,): 1.0}, {None: 1.0}):
        pairs.append(("logit_bias", value))
    for value in (math.nan, math.inf, "-inf", None, True, [1.0], 1e31, -1e31, HUGE, torch.zeros(2)):
        pairs.append(("logit_bias", {3: value}))
    for value in (len, "len", [len, "len"], [None], None, {len}, [[len]]):
        pairs.append(("logits_processors", value))
    return pairs


@pytest.mark.parametrize(("name", "value"), wrong_values(), ids=lambda v: short_repr(v)[:30])
def test_a_wrong_value_is_named_with_what_is_possible(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} .*must (be|have) .+, not .+") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams)])
def test_every_field_has_wrong_values_above(name: str) -> None:
    assert name in {n for n, _ in wrong_values()}


@pytest.mark.parametrize(
    "good",
    [
        *({name: value} for name, limits in (NUMBERS | WHOLE).items() for value in limits if value != math.inf),
        {"repetition_penalty": 1e-9},
        {"repetition_penalty": 2},
        {"max_time": 0.01},
        {"logit_bias": {}},
        {"logit_bias": {0: -math.inf, 7: 5, 8: -1e30}},
        {"stop_token_ids": (0, 5)},
        {"min_tokens": 5, "max_tokens": 5},
        {"min_tokens": 5},
    ],
    ids=str,
)
def test_the_limits_themselves_are_possible(good: dict[str, object]) -> None:
    params = SamplingParams(**good)
    assert all(getattr(params, name) == value for name, value in good.items())


def test_min_tokens_above_max_tokens_names_both() -> None:
    with pytest.raises(RequestError, match="min_tokens must be at most max_tokens, 4, not 5"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(RequestError, match="min_tokens"):
        replace(SamplingParams(max_tokens=9, min_tokens=9), max_tokens=8)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_what_was_passed_may_change_and_params_do_not() -> None:
    bias, ids, stop, functions = {1: 2.0}, [3], ["a"], [len]
    params = SamplingParams(logit_bias=bias, stop_token_ids=ids, stop=stop, logits_processors=functions)
    bias[1] = bias[2] = 9.0
    ids.append(4)
    stop.append("b")
    functions.clear()
    assert params.logit_bias == {1: 2.0}
    assert (params.stop_token_ids, params.stop, params.logits_processors) == ((3,), ("a",), (len,))
    with pytest.raises(TypeError):
        params.logit_bias[1] = 3.0
    with pytest.raises(FrozenInstanceError):
        params.n = 2


@pytest.mark.parametrize("again", [replace, copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_params_are_hashed_replaced_copied_and_pickled(again: Callable[[SamplingParams], SamplingParams]) -> None:
    params = SamplingParams(logit_bias={1: 2.0, 4: -math.inf}, stop_token_ids=[3], stop="a", logits_processors=[len])
    assert params.changes_logits
    twin = again(params)
    assert twin == params
    assert hash(twin) == hash(params)
    assert twin.changes_logits
    assert twin != replace(params, logit_bias={1: 2.5, 4: -math.inf})


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 0.9},
        {"presence_penalty": -1.0},
        {"frequency_penalty": 0.1},
        {"logit_bias": {0: 1.0}},
        {"min_tokens": 1},
        {"logits_processors": [len]},
    ],
    ids=str,
)
def test_a_replaced_field_decides_anew_whether_logits_change(asked: dict[str, object]) -> None:
    plain = SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, stop_token_ids=[1], logit_bias={})
    assert plain.changes_logits is False
    assert replace(plain, **asked).changes_logits is True
    back = {name: getattr(plain, name) for name in asked}
    assert replace(replace(plain, **asked), **back).changes_logits is False


def test_token_ids_beyond_the_vocabulary() -> None:
    check_vocab(SamplingParams(logit_bias={99: 1.0}, stop_token_ids=[0, 99]), 100)
    with pytest.raises(RequestError, match="logit_bias: token id 99 is outside the vocabulary of 99"):
        check_vocab(SamplingParams(logit_bias={5: 1.0, 99: 1.0}), 99)
    with pytest.raises(RequestError, match="stop_token_ids: token id 99 is outside the vocabulary of 99"):
        check_vocab(SamplingParams(stop_token_ids=[99]), 99)
