"""Answers match the structure that was asked for, whatever else is asked for and whoever else runs."""

import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
import torch
from torch import Tensor

from llama_mini import LLM, Completion, SamplingParams
from llama_mini.engine import runner as runner_module
from llama_mini.engine import structured
from llama_mini.engine.pages import PAGE
from llama_mini.errors import RequestError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "é", None, 2.5]},
        "of": {"$ref": "#/$defs/many"},
        "at": {"type": "string", "pattern": "^[a-z]{1,3}@[a-z]{2}$"},
    },
    "required": ["name", "age", "of"],
    "additionalProperties": False,
    "$defs": {"many": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"const": "x"}]}, "maxItems": 3}},
}
SCHEMAS = [
    PERSON,
    {
        "type": "array",
        "prefixItems": [{"type": "string", "format": "date"}, {"type": "number", "multipleOf": 7, "maximum": 999}],
        "items": False,
        "minItems": 2,
    },
    {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 2,
        "additionalProperties": {"type": "string", "maxLength": 3},
    },
]
OTHERS = [
    {"regex": r"([a-zé]{2,4}@(example|test)\.(org|net)|[+-]?\d{1,3}(\.\d\d)?) — [^a-z]{3}"},
    {"choice": ["yes", "no", "perhaps\n", "日本"]},
    {"grammar": 'start: pair ("," pair)*\npair: NAME "=" /[0-9]{1,3}/\nNAME: /[a-z]{1,4}/'},
    {"grammar": 'root ::= pair ("," pair)*\npair ::= name "=" [0-9]{1,3}\nname ::= [a-z]{1,4}'},
]
SAMPLED = SamplingParams(temperature=1.0, max_tokens=200)


@pytest.fixture(scope="module")
def llm(tiny_dir) -> LLM:
    return LLM(tiny_dir, dtype="bfloat16", threads=1)


def check(completion: Completion, asked: dict[str, Any]) -> bool:
    """Whether the answer came to its end; it must then match what was asked for."""
    assert completion.error is None
    if completion.finish_reason == "length":
        return False
    if "json_schema" in asked:
        assert jsonschema_rs.validator_for(asked["json_schema"]).is_valid(json.loads(completion.text)), completion.text
    elif "choice" in asked:
        assert completion.text in asked["choice"]
    else:
        pattern = asked.get("regex", r"[a-z]{1,4}=[0-9]{1,3}(,[a-z]{1,4}=[0-9]{1,3})*")
        assert re.fullmatch(pattern, completion.text)
    return True


@pytest.mark.parametrize("n_seeds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_sampled_answers_match_among_free_ones(llm: LLM, n_seeds: int) -> None:
    """And the free ones are what they are alone."""
    asked = [{"json_schema": schema} for schema in SCHEMAS] + OTHERS
    each = [replace(SAMPLED, seed=seed, **one) for one in asked for seed in range(n_seeds)]
    free = [replace(SAMPLED, seed=seed, max_tokens=30) for seed in range(4)]
    expected = [llm.generate("hello", params)[0] for params in free]
    found = llm.generate(["hello"] * (len(each) + 4), [*free[:2], *each, *free[2:]])
    for completion, alone in zip(found[:2] + found[-2:], expected, strict=True):
        assert (completion.token_ids, completion.logprobs) == (alone.token_ids, alone.logprobs)
    ended = [check(completion, asked[i // n_seeds]) for i, completion in enumerate(found[2:-2])]
    assert sum(ended) > 0.9 * len(ended)
    for completion, params in list(zip(found[2:-2], each, strict=True))[:: 2 * n_seeds]:
        assert completion.token_ids == llm.generate("hello", params)[0].token_ids
    assert len({completion.text for completion in found}) > len(found) / 2


@pytest.mark.parametrize("asked", OTHERS, ids=lambda asked: str(asked)[:20])
def test_greedy_answers_match_and_streams_are_equal(llm: LLM, asked: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=100, **asked)
    (completion,) = llm.generate("hello", params)
    check(completion, asked)
    assert "".join(chunk.text for chunk in llm.stream("hello", params)) == completion.text


def test_a_complete_answer_ends_at_once_and_needs_no_end_token(llm: LLM) -> None:
    params = SamplingParams(choice=["yes"], ignore_eos=True, min_tokens=50)
    (completion,) = llm.generate("hello", params)
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("yes", "stop", 3)
    (open_ended,) = llm.generate("hello", regex="(yes)+", max_tokens=8, ignore_eos=True)
    assert (open_ended.text, open_ended.finish_reason) == ("yesyesye", "length")
    likely = dict.fromkeys(llm.tokenizer.eos_ids, 100.0)
    (ended,) = llm.generate("hello", regex="(yes)+", logit_bias=likely)
    assert (ended.text, ended.finish_reason, len(ended.token_ids)) == ("yes", "stop", 4)
    (later,) = llm.generate("hello", regex="(yes)+", logit_bias=likely, min_tokens=4)
    assert (later.text, later.finish_reason) == ("yesyes", "stop")
    y = llm.tokenizer.encode("y", add_special_tokens=False)
    (cut,) = llm.generate("hello", choice=["abyx"], stop_token_ids=y)
    assert (cut.text, cut.finish_reason) == ("ab", "stop")
    (cut,) = llm.generate("hello", choice=["abyx"], stop=["by"])
    assert (cut.text, cut.finish_reason) == ("a", "stop")


def test_all_else_that_changes_logits_holds_within_the_structure(llm: LLM) -> None:
    a, b, c = (llm.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc")
    seen: list[Tensor] = []

    def wants_c(_: list[int], logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits.index_fill(0, torch.tensor([c]), 1e6)

    (completion,) = llm.generate("hello", regex="[ab]{6}", logit_bias={a: -1.0, c: 1e6}, logits_processors=[wants_c])
    assert re.fullmatch("[ab]{6}", completion.text)
    assert all(logits.isfinite().nonzero().flatten().tolist() == sorted([a, b]) for logits in seen)
    (banned,) = llm.generate("hello", regex="[ab]{6}", logit_bias={a: float("-inf")})
    assert banned.text == "bbbbbb"
    (penalised,) = llm.generate("hello", regex="[ab]{6}", frequency_penalty=2.0, logit_bias={a: 20, b: 20})
    assert penalised.text.count("a") == 3
    for completion in llm.generate("hello", regex="[ab]{6}", temperature=2.0, top_k=1, n=2):
        assert re.fullmatch("[ab]{6}", completion.text)
    plain = llm.generate("hello", max_tokens=1, top_logprobs=5)[0]
    assert llm.generate("hello", choice=["ab"], top_logprobs=5)[0].top_logprobs[0] == plain.top_logprobs[0]


def test_one_that_cannot_go_on_fails_alone_and_says_why(llm: LLM) -> None:
    a = llm.tokenizer.encode("a", add_special_tokens=False)[0]
    cannot = [
        ({"regex": "ba", "logit_bias": {a: float("-inf")}}, "ban all tokens that regex allows: leave at least one"),
        (
            {
                "regex": "ba",
                "logits_processors": [lambda ids, x: x.index_fill(0, torch.tensor([a]), -1e9).clamp(max=0)],
            },
            None,
        ),
        (
            {"regex": "ba", "logits_processors": [lambda ids, x: torch.full_like(x, float("-inf"))]},
            "bans all 260 tokens",
        ),
        ({"regex": "(((a|b){1,1000}){1,1000}c){1,1000}", "ignore_eos": True, "max_tokens": 400}, "regex: .*too many"),
    ]
    *found, free = llm.generate(
        ["hello"] * 5, [*(SamplingParams(**one) for one, _ in cannot), SamplingParams(max_tokens=9)]
    )
    for completion, (_, message) in zip(found, cannot, strict=True):
        assert (completion.finish_reason == "error") == (message is not None)
        assert message is None or re.search(message, completion.error)
    assert free.token_ids == llm.generate("hello", max_tokens=9)[0].token_ids


def test_answers_to_one_prompt_keep_their_own_place(llm: LLM) -> None:
    params = replace(SAMPLED, regex=r"[a-z]{3,9}(-\d+)?!", n=4, seed=3)
    answers = llm.generate("hello", params)
    assert len({answer.text for answer in answers}) == 4
    for i, answer in enumerate(answers):
        assert re.fullmatch(params.regex, answer.text)
        assert answer.token_ids == llm.generate("hello", replace(params, n=1, seed=3 + i))[0].token_ids


def test_a_request_that_is_preempted_keeps_its_place(tiny_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_dir, dtype="bfloat16", threads=1)
    prompts = [[i] * 200 for i in (3, 4, 5)]
    params = replace(SAMPLED, regex=r"(\d\d:[a-z]+;){50}", max_tokens=100, seed=1)
    expected = llm.generate(prompts, params)
    llm.forget()
    monkeypatch.setattr(runner_module, "fitting_positions", lambda *_: 4 * PAGE)
    seen, preempt = [], runner_module.Request.preempt
    monkeypatch.setattr(runner_module.Request, "preempt", lambda request: seen.append(request) or preempt(request))
    for completion, other in zip(llm.generate(prompts, params), expected, strict=True):
        assert completion.token_ids == other.token_ids
    assert any(len(request.token_ids) > 1 for request in seen)


def test_guesses_change_no_answer(tiny_dir, llm: LLM) -> None:
    """The draft model is the model itself, so that many of its guesses are right."""
    guessing = LLM(tiny_dir, dtype="bfloat16", threads=1, draft=tiny_dir)
    each = [replace(SAMPLED, seed=1, **one) for one in ({"json_schema": PERSON}, *OTHERS)]
    each += [replace(params, temperature=0.0) for params in each]
    found = [guessing.generate("hello", params)[0] for params in each]
    for completion, params in zip(found, each, strict=True):
        assert completion.token_ids == llm.generate("hello", params)[0].token_ids
    assert sum(completion.stats.accepted_tokens for completion in found) > 10


def test_a_slow_one_delays_only_its_caller(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, compiled = threading.Event(), threading.Event(), structured._checked

    def slow(grammar: dict[str, Any]) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(60)
        return compiled(grammar)

    monkeypatch.setattr(structured, "_checked", slow)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(llm.generate, "hello", grammar="root ::= [a-c]{4}")
        assert begun.wait(60)
        assert llm.generate("hello", choice=["yes"])[0].text == "yes"
        go_on.set()
        assert re.fullmatch("[a-c]{4}", answer.result()[0].text)


def test_a_wrong_one_of_many_is_refused_alone(llm: LLM) -> None:
    each = [SamplingParams(choice=["yes"]), SamplingParams(regex="("), SamplingParams(choice=["no"])]
    found = dict(llm.completions(["a", "b", "c"], each))
    assert [found[i].text for i in range(3)] == ["yes", "", "no"]
    assert found[1].error == "regex: unclosed group"
    with pytest.raises(RequestError, match="regex: unclosed group"):
        llm.generate(["a", "b"], each[:2])


def test_without_the_library_a_sentence_says_how_to_install_it(tiny_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_dir, threads=1)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for asked in ({"json_schema": True}, OTHERS[0], OTHERS[1], OTHERS[2], OTHERS[3]):
        with pytest.raises(
            RequestError, match=r"structured output needs llguidance.*pip install 'llama-mini\[serve\]'"
        ):
            llm.generate("hello", **asked)
    assert llm.generate("hello", max_tokens=2)
