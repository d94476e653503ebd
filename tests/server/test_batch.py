"""Requests of many clients in one batch: a long prompt beside streams, and more than the cache has room for."""

import json
import re
import select
from contextlib import ExitStack

import pytest

from llama_mini import LLM
from llama_mini.engine import runner
from llama_mini.engine.async_call import AsyncCall
from llama_mini.engine.pages import PAGE
from llama_mini.engine.request import Request
from llama_mini.server.app import create_app
from llama_mini.server.settings import Settings
from tests.server.live import ask, connect, parsed, post, read_all, read_until, serving, until
from tests.server.test_responses import Gate

TEXT = "/v1/completions"


def test_streams_get_a_token_between_any_two_parts_of_a_long_prompt(
    new_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the prompt gets a part between any two of their tokens: nobody waits for the others."""
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 32)
    settings, submit, calls = Settings(), new_llm.submit, list[AsyncCall]()
    monkeypatch.setattr(new_llm, "submit", lambda *arguments: (calls.append(submit(*arguments)), calls[-1])[1])
    with serving(create_app(new_llm, settings), settings) as (_, port), Gate(new_llm) as gate, ExitStack() as stack:
        writes_x = {"logit_bias": {str(new_llm.tokenizer.encode("x", False)[0]): 100}, "temperature": 0}
        body = writes_x | {"prompt": "abc", "max_tokens": 100, "stream": True}
        streams = [stack.enter_context(connect(port, post(TEXT, body))) for _ in range(4)]
        got = [b""] * 4

        def tokens() -> list[int]:
            """How many each stream has."""
            for client in select.select(streams, [], [], 0)[0]:
                got[streams.index(client)] += client.recv(2**16)
            return [each.count(b'"text":"x"') for each in got]

        until(lambda: len(calls) == 4)
        gate.allow(8)  # their prompts, and some steps; the next step waits
        until(lambda: gate.passes == 9)
        until(lambda: sum(tokens()) == new_llm.activity().generated_tokens)
        before = tokens()
        assert min(before) > 0
        long = stack.enter_context(connect(port, post(TEXT, writes_x | {"prompt": "y" * 400, "max_tokens": 1})))
        until(lambda: len(calls) == 5)
        for n in range(1, 15):  # the step that waits, and those after each of 13 parts of at most 32 tokens
            assert not select.select([long], [], [], 0)[0]
            gate.allow(1 if n == 1 else 2)
            until(lambda n=n: tokens() == [each + n for each in before])
        assert b'"prompt_tokens":401' in read_until(long, b"}}")


def test_requests_for_which_the_cache_has_no_room_finish_with_the_tokens_that_they_have_alone(
    new_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ["x" * (PAGE - 2), "y" * (PAGE - 3)]  # whose answers begin another page
    prompts = [*"abcdef", *long]
    alone = [answer.text for answer in new_llm.generate(prompts, max_tokens=4, ignore_eos=True)]
    assert len(set(alone)) > 4
    new_llm.forget()
    monkeypatch.setattr(runner, "fitting_positions", lambda *_: 4 * PAGE)
    preempted, preempt = list[Request](), Request.preempt
    monkeypatch.setattr(Request, "preempt", lambda request: (preempted.append(request), preempt(request)))
    settings, more = Settings(), {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    with serving(create_app(new_llm, settings), settings) as (_, port), ExitStack() as stack:
        bodies = [more | {"prompt": prompts[i % 8], "stream": i % 16 < 8} for i in range(64)]
        requests = [post(TEXT, body, connection="close") for body in bodies]
        clients = [stack.enter_context(connect(port, request)) for request in requests]
        replies = [parsed(read_all(client)) for client in clients]
        assert preempted
        until(lambda: new_llm.activity().cache_usage == 0)
        assert text_of(ask(port, requests[-1])[2]) == alone[-1]
    assert {status for status, _, _ in replies} == {200}
    assert [text_of(body) for _, _, body in replies] == alone * 8


def text_of(body: bytes) -> str:
    """The text of a reply, at once or in a stream."""
    data = [body] if body.startswith(b"{") else re.findall(rb"data: (\{.*\})\n\n", body)
    return "".join(json.loads(each)["choices"][0]["text"] for each in data)
