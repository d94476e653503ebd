"""Every form in which callers have prompts and parameters, and what is said about the others."""

import asyncio
from collections import deque
from collections.abc import Iterator
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from llama_mini import LLM, SamplingParams
from llama_mini.engine.llm import MOST_AT_ONCE, TAKEN_AT_ONCE
from llama_mini.engine.prompts import is_messages
from llama_mini.errors import CapacityError, RequestError

IDS = [256, 104, 101, 108, 108, 111]
OTHER = [256, 120]
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llm(tiny_dir: Path) -> LLM:
    return LLM(model=tiny_dir, dtype="float32")


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    return [llm.generate(ids, GREEDY)[0].token_ids for ids in (IDS, OTHER)]


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(IDS),
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int32),
        np.array(IDS),
        np.array([IDS], dtype=np.uint16),
        [np.int64(i) for i in IDS],
        list(torch.tensor(IDS)),
        [IDS],
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_prompt_in_other_forms(llm: LLM, prompt: Any, expected: list[list[int]]) -> None:
    assert [c.token_ids for c in llm.generate(prompt, GREEDY)] == expected[:1]
    assert [chunk.token_id for chunk in llm.stream(prompt, GREEDY)] == expected[0]
    assert llm.score(prompt) == llm.score(IDS)


@pytest.mark.parametrize(
    "prompts",
    [
        (IDS, OTHER),
        [torch.tensor(IDS), np.array(OTHER)],
        [torch.tensor([IDS]), np.array([OTHER])],  # as tokenizers return them
        ([IDS], (OTHER,)),
        deque([IDS, OTHER]),
        {IDS[0]: IDS, 1: OTHER}.values(),
        torch.tensor([OTHER, OTHER]),
        np.array([OTHER, OTHER]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_several_prompts_in_other_forms(llm: LLM, prompts: Any, expected: list[list[int]]) -> None:
    twice = isinstance(prompts, torch.Tensor | np.ndarray)
    assert [c.token_ids for c in llm.generate(prompts, GREEDY)] == ([expected[1]] * 2 if twice else expected)


def test_prompts_by_their_name_in_vllm(llm: LLM, expected: list[list[int]]) -> None:
    assert [c.token_ids for c in llm.generate(prompt_token_ids=[IDS, OTHER], sampling_params=GREEDY)] == expected
    assert [c.token_ids for c in llm.generate(None, GREEDY, prompt_token_ids=IDS)] == expected[:1]
    with pytest.raises(RequestError, match="unknown setting 'prompt_token_ids'"):
        llm.generate(IDS, GREEDY, prompt_token_ids=IDS)
    with pytest.raises(RequestError, match="or a list of these, not None"):
        llm.generate()


def test_texts_in_other_forms(llm: LLM) -> None:
    texts = ["hello", "x", ""]  # the tiny tokenizer adds a BOS, so that even no text is a prompt
    expected = [c.token_ids for c in llm.generate(texts, GREEDY)]
    for prompts in (tuple(texts), np.array(texts), (text for text in texts), dict.fromkeys(texts).keys()):
        assert [c.token_ids for c in llm.generate(prompts, GREEDY)] == expected
    assert llm.generate(range(97, 100), GREEDY)[0].token_ids == llm.generate([97, 98, 99], GREEDY)[0].token_ids


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "a prompt is a text or a list of token ids, whole numbers, or a list of these, not None"),
        (5, "not 5"),
        (torch.tensor(5), "not 5"),
        (b"text", "not b'text': decode it first"),
        ({"a"}, "a set has no order"),
        (Path("x"), "not PosixPath"),
        ([1.5, 2.0], "not 1.5"),
        (torch.tensor([1.0, 2.0]), "not 1.0"),
        (np.array([True, False]), "not True"),
        ([[1, True]], "not True"),
        ([[1, 2.0]], "not 2.0"),
        ([None], "not None"),
        ([b"x"], "decode it first"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"not \[0, 0, 0\]"),
        ([[1, 10**9]], "token id 1000000000 is outside the vocabulary of 260"),
        (np.array([-1]), "token id -1 is outside"),
        ([[]], "the prompt is empty"),
        (CHAT, "llm.chat answers messages"),
        (CHAT[0], "llm.chat answers messages"),
        ([CHAT], "llm.chat answers messages"),
        ([SimpleNamespace(role="user", content="Hi")], "llm.chat answers messages"),
        ({"prompt": "x"}, "not {'prompt': 'x'}: give its text or its token ids alone"),
        ([{"prompt_token_ids": IDS}], "give its text or its token ids alone"),
        (BatchEncoding({"input_ids": IDS}), "give its text or its token ids alone"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_prompt_is_said(llm: LLM, prompts: Any, message: str) -> None:
    stream = [] if is_messages(prompts) else [llm.stream]  # which takes messages
    for call in (llm.generate, llm.score, *stream):
        with pytest.raises(RequestError, match=message):
            call(prompts)


def test_one_prompt_where_one_is_possible(llm: LLM) -> None:
    for call in (llm.score, llm.stream):
        with pytest.raises(RequestError, match=r"one prompt is expected here, not .*: several are for llm.generate"):
            call([IDS, OTHER])
        with pytest.raises(RequestError, match="the prompt is empty"):
            call([])


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        (None, {"max_tokens": 4, "ignore_eos": True}),
        (None, {"max_new_tokens": np.int64(4), "ignore_eos": True, "do_sample": False}),
        ({"max_tokens": 4, "ignore_eos": True}, {}),
        ({"max_tokens": 9, "ignore_eos": True, "temperature": None}, {"max_completion_tokens": 4}),
        (SamplingParams(max_tokens=9, ignore_eos=True), {"max_tokens": 4}),
        (None, {"sampling_params": GREEDY}),
        (None, {"sampling_params": {"ignore_eos": True}, "n_predict": 4}),
    ],
    ids=str,
)
def test_settings_in_all_forms_and_calls(llm: LLM, expected: list[list[int]], params: Any, settings: Any) -> None:
    assert [c.token_ids for c in llm.generate([IDS, OTHER], params, **settings)] == expected
    assert [c.token_id for c in llm.stream(IDS, params, **settings)] == expected[0]
    assert {i: c.token_ids for i, c in llm.completions([IDS, OTHER], params, **settings)} == dict(enumerate(expected))
    ids = llm.tokenizer.apply_chat_template(CHAT)
    answer = llm.generate(ids, GREEDY)[0].token_ids
    assert llm.chat(CHAT, params, **settings).token_ids == answer
    assert [c.token_id for c in llm.stream(CHAT, params, **settings)] == answer

    async def collected() -> list[int | None]:
        return [chunk.token_id async for chunk in llm.astream(IDS, params, **settings)]

    assert asyncio.run(collected()) == expected[0]


def test_settings_of_each_prompt(llm: LLM) -> None:
    each = [GREEDY, {"max_tokens": 2, "ignore_eos": True}, None]
    lengths = [len(c.token_ids) for c in llm.generate([IDS] * 3, each, max_time=1e9)]
    assert lengths[:2] == [4, 2]
    assert [len(c.token_ids) for c in llm.generate([IDS] * 2, iter(each[:2]))] == [4, 2]
    for given, words in (
        (repeat(GREEDY, 1), "1 params, but more prompts"),
        (repeat(GREEDY), "2 prompts, but more params"),
    ):
        with pytest.raises(RequestError, match=f"there are only {words}"):
            llm.generate([IDS, OTHER], given)


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ("greedy", {}, "params must be SamplingParams or a dict of its settings, not 'greedy'"),
        (5, {}, "params must be SamplingParams or a dict"),
        ([5], {}, "params must be SamplingParams or a dict"),
        (None, {"max_tokns": 5}, "unknown setting 'max_tokns'; did you mean max_tokens"),
        ({"tempature": 5}, {}, "did you mean temperature"),
        (None, {"enable_thinking": False}, "unknown setting 'enable_thinking'"),
        (None, {"stream": True}, "call llm.stream"),
        (GREEDY, {"sampling_params": GREEDY}, "params and sampling_params are the same argument"),
        (None, {"max_tokens": 3, "max_new_tokens": 4}, "two values, 3 and 4"),
    ],
    ids=str,
)
def test_what_is_no_setting_is_said(llm: LLM, params: Any, settings: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([IDS], params, **settings)


def test_other_settings_of_a_chat_are_variables_of_its_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def template(messages: Any, **variables: Any) -> list[int]:
        seen.append({"messages": messages} | variables)
        return IDS

    fake = SimpleNamespace(apply_chat_template=template)
    monkeypatch.setattr(llm, "tokenizer", _Both(fake, llm.tokenizer))
    for call in (llm.chat, lambda *args, **kwargs: list(llm.stream(*args, **kwargs))):
        call(CHAT, GREEDY, tools=[{"name": "f"}], enable_thinking=False, temp=0, documents=None)
        assert seen.pop() == {"messages": CHAT, "tools": [{"name": "f"}], "enable_thinking": False, "documents": None}
        with pytest.raises(RequestError, match=r"call llm\.stream"):
            call(CHAT, stream=True)


class _Both:
    """Attributes of the first object that has them."""

    def __init__(self, *objects: Any) -> None:
        self.objects = objects

    def __getattr__(self, name: str) -> Any:
        return next(getattr(each, name) for each in self.objects if hasattr(each, name))


def test_completions_take_prompts_as_they_need_them(llm: LLM, expected: list[list[int]]) -> None:
    taken = 0

    def endless() -> Iterator[Any]:
        nonlocal taken
        for taken in count(1):
            yield [1.5] if taken % 5 == 0 else IDS

    completions = llm.completions(endless(), repeat(GREEDY))
    first = next(completions)
    assert taken <= TAKEN_AT_ONCE
    found = dict([first, *(next(completions) for _ in range(99))])
    assert taken <= 100 + MOST_AT_ONCE
    completions.close()
    assert all("not 1.5" in c.error if index % 5 == 4 else c.token_ids == expected[0] for index, c in found.items())
    assert llm.generate(IDS, GREEDY)  # the model is free again
    wrong = dict(llm.completions([IDS, IDS], [GREEDY, {"max_tokns": 3}]))
    assert (wrong[0].error, wrong[1].finish_reason) == (None, "error")
    assert "max_tokens" in wrong[1].error


def test_a_short_answer_comes_before_the_others_begin(llm: LLM, passes: list[tuple[int, int]]) -> None:
    """And where it would delay the others, it runs with them. Of a generator, only those that were taken are known."""
    for n, n_new, kind, alone in (
        (16, 2, list, True),
        (16, 39, list, False),
        (64, 20, list, True),
        (64, 20, lambda prompts: (prompt for prompt in prompts), False),
    ):
        llm.forget()
        each = [SamplingParams(max_tokens=n_new if i == 9 else 40, ignore_eos=True) for i in range(n)]
        passes.clear()
        index, completion = next(llm.completions(kind([[256, i] for i in range(n)]), each))
        assert (index, len(completion.token_ids)) == (9, n_new)
        assert passes[0] == (1, 2)
        assert ((1, 2) not in passes[1:n_new]) == alone  # the prompt of another one, before its last step


def test_only_a_path_or_a_name_is_a_model(llm: LLM) -> None:
    for model in (llm.model, 5, None):
        with pytest.raises(RequestError, match="model must be a path or a hub name"):
            LLM(model)


def test_a_score_that_does_not_fit_is_refused_before_it_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mini.memory.available_memory", lambda device: 1000)
    llm.forget()
    with pytest.raises(CapacityError, match=f"has {len(IDS)} positions .* only 0 positions fit"):
        llm.score(IDS)
