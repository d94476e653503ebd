"""What SamplingParams takes, what it refuses and by which name, and that it stays as it was made."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch

from llama_mini import SamplingParams
from llama_mini.engine.sampling_params import ALIASES, ELSEWHERE, check_vocab, is_setting, sampling_params
from llama_mini.engine.structured import STRUCTURES
from llama_mini.errors import LlamaMiniWarning, RequestError
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
    "seed": (-(2**63), 2**64 - 1),
    "min_tokens": (0, math.inf),
    "max_tokens": (1, math.inf),
    "top_logprobs": (0, math.inf),
}
POSITIVE = ["repetition_penalty", "max_time"]
NO_NUMBER = [True, "1", math.nan, math.inf, -math.inf, [1], {1: 1}, 1j, torch.tensor([1.0, 2.0])]
HUGE = 10**400  # no float holds it
NO_FLAG = [0, 1, "yes", 1.0]
MINUS_ONE = {"top_k", "seed", "max_tokens"}  # where others write -1 for None


def wrong_values() -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, (low, high) in NUMBERS.items():
        pairs += [(name, value) for value in [*NO_NUMBER, HUGE, low - 0.1]]
        pairs += [(name, high + 0.1)] if high < math.inf else []
    for name, (low, high) in WHOLE.items():
        pairs += [(name, value) for value in [*NO_NUMBER, 1.0, -2 if low == 0 and name in MINUS_ONE else low - 1]]
        pairs += [(name, high + 1)] if high < math.inf else []
    for name in POSITIVE:
        pairs += [(name, value) for value in [*NO_NUMBER, HUGE, 0, -0.5]]
    for name in ("ignore_eos", "prompt_logprobs", "token_logprobs"):
        pairs += [(name, value) for value in NO_FLAG]
    pairs += [(name, value) for name in STRUCTURES for value in (5, "", b"a", [""], [["a"]], {"a": math.nan})]
    pairs += [("cache_salt", value) for value in (5, True, b"a", ["a"])]
    for value in ("", ["a", 3], ["a", ""], [["a"]], 5, {"a": 1}, {""}, {1}, [None], b"a"):
        pairs.append(("stop", value))
    for value in (-1, True, 1.5, "5", b"5", [-1], [True], [1.0], ["1"], [[1]], {"1"}, [None], torch.ones(2)):
        pairs.append(("stop_token_ids", value))
    for value in ([(1, 2)], 5, "a", {-1: 0.0}, {True: 1.0}, {"1": 1.0}, {1.0: 1.0}, {(1,): 1.0}, {None: 1.0}):
        pairs.append(("logit_bias", value))
    for value in (math.nan, math.inf, "-inf", None, True, [1.0], 1e31, -1e31, HUGE, torch.zeros(2)):
        pairs.append(("logit_bias", {3: value}))
    for value in (len, "len", [len, "len"], [None], {len}, [[len]]):
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


def test_stops_come_alone_in_lists_and_in_sets() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["b", "a"]).stop == ("b", "a")
    assert SamplingParams(stop={"b", "a"}) == SamplingParams(stop=frozenset({"a", "b"}))
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)
    assert SamplingParams(stop_token_ids={9, 7}).stop_token_ids == (7, 9)


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams)])
def test_none_is_not_given(name: str) -> None:
    assert SamplingParams(**{name: None}) == SamplingParams()
    base = SamplingParams(temperature=0.5, max_tokens=7, stop="x", seed=3)
    assert sampling_params(base, **{name: None}) == base


@pytest.mark.parametrize("name", sorted(MINUS_ONE))
def test_minus_one_is_not_given_where_others_write_it(name: str) -> None:
    assert SamplingParams(**{name: -1}) == SamplingParams()


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    given = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        top_p=torch.tensor(0.25),
        seed=np.uint64(2**64 - 1),
        max_tokens=torch.tensor(9),
        n=np.array(2),
        ignore_eos=np.True_,
        stop=np.array(["a", "b"]),
        stop_token_ids=np.array([1, 2]),
        logit_bias={np.int32(3): np.float16(-1.5), torch.tensor(4).item(): -math.inf},
    )
    plain = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        seed=2**64 - 1,
        max_tokens=9,
        n=2,
        ignore_eos=True,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        logit_bias={3: -1.5, 4: -math.inf},
    )
    assert given == plain
    assert all(type(getattr(given, f.name)) is type(getattr(plain, f.name)) for f in fields(SamplingParams))
    assert SamplingParams(stop_token_ids=[np.int64(1), torch.tensor(2)]).stop_token_ids == (1, 2)


@pytest.mark.parametrize("name", ALIASES)
def test_other_names_of_a_setting(name: str) -> None:
    value = "END" if ALIASES[name] == "stop" else 3
    replaces = {"ignore_eos": True} if name == "eos_token_id" else {}  # the model's own, as in transformers
    expected = SamplingParams(**{ALIASES[name]: value}, **replaces)
    assert SamplingParams(**{name: value}) == expected
    assert sampling_params(SamplingParams(top_p=0.5), **{name: value}) == replace(expected, top_p=0.5)
    assert sampling_params(None, **{name: value, ALIASES[name]: value}) == expected
    other = "STOP" if value == "END" else 4
    with pytest.raises(RequestError, match=f"{name} and {ALIASES[name]} are one setting and have two values"):
        SamplingParams(**{name: value, ALIASES[name]: other})


def test_every_alias_is_a_name_of_a_field_and_not_a_field() -> None:
    names = {f.name for f in fields(SamplingParams)}
    assert set(ALIASES.values()) <= names
    assert not names & (ALIASES.keys() | ELSEWHERE.keys())
    assert all(map(is_setting, [*names, *ALIASES, *ELSEWHERE, "do_sample"]))
    assert not is_setting("tools")


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({"do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"do_sample": True, "temp": None}, 1.0),
        ({"do_sample": None}, 0.0),
    ],
    ids=str,
)
def test_do_sample_decides_on_the_temperature(given: dict[str, object], temperature: float) -> None:
    assert SamplingParams(**given) == SamplingParams(temperature=temperature)
    assert sampling_params(SamplingParams(temperature=0.7), do_sample=True).temperature == 0.7
    assert sampling_params(SamplingParams(temperature=0.7), do_sample=False).temperature == 0


def test_a_contradiction_of_do_sample_and_temperature_is_said() -> None:
    with pytest.warns(LlamaMiniWarning, match=r"the temperature of 0\.7 has no effect"):
        assert SamplingParams(do_sample=False, temperature=0.7).temperature == 0
    with pytest.raises(RequestError, match="do_sample=True needs a temperature above 0"):
        SamplingParams(do_sample=True, temperature=0)
    with pytest.raises(RequestError, match="do_sample must be true or false, not 1"):
        SamplingParams(do_sample=1)


def test_logprobs_is_a_flag_or_a_number() -> None:
    for flag in (True, False):
        assert SamplingParams(logprobs=flag, top_logprobs=4) == SamplingParams(token_logprobs=flag, top_logprobs=4)
    assert SamplingParams(logprobs=4).top_logprobs == 4


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_tokns", "did you mean max_tokens"),
        ("max_new_token", "did you mean max_new_tokens"),
        ("Temperature", "did you mean temperature"),
        ("max_length", "give max_tokens, which counts new tokens alone"),
        ("stream", "call llm.stream"),
        ("zzz", "known: temperature, top_k"),
    ],
)
def test_an_unknown_setting_gets_the_nearest_name(name: str, advice: str) -> None:
    for value in (1, None):
        for call in (SamplingParams, partial(sampling_params, SamplingParams()), lambda **k: sampling_params(k)):
            with pytest.raises(RequestError, match=f"unknown setting '{name}'; {advice}"):
                call(**{name: value})


def test_settings_over_params() -> None:
    base = SamplingParams(temperature=0.5, max_tokens=9)
    assert sampling_params(base) is base
    assert sampling_params(base, max_tokens=3, seed=1) == SamplingParams(temperature=0.5, max_tokens=3, seed=1)
    assert sampling_params({"temp": 0.5}, top_k=2) == SamplingParams(temperature=0.5, top_k=2)
    assert sampling_params() == sampling_params(None) == sampling_params({}) == SamplingParams()
    for wrong in ("greedy", 5, [base], object()):
        with pytest.raises(RequestError, match="params must be SamplingParams or a dict of its settings, not"):
            sampling_params(wrong)
    with pytest.raises(RequestError, match="unknown setting '1'"):
        sampling_params({1: 2})


def test_the_constructor_takes_and_shows_its_fields_by_name() -> None:
    with pytest.raises(RequestError, match=r"give settings by name, as in temperature=0\.7, not {'top_k': 1}"):
        SamplingParams({"top_k": 1})
    assert [p.name for p in signature(SamplingParams).parameters.values()] == [f.name for f in fields(SamplingParams)]


def test_what_was_passed_may_change_and_params_do_not() -> None:
    bias, ids, stop, functions = {1: 2.0}, [3], ["a"], [len]
    params = SamplingParams(logit_bias=bias, stop_token_ids=ids, stop=stop, logits_processors=functions)
    bias[1] = bias[2] = 9.0
    ids.append(4)
    stop.append("b")
    functions.clear()
    assert params.logit_bias == {1: 2.0}
    assert (params.stop_token_ids, params.stop, params.logits_processors) == ((3,), ("a",), (len,))
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
