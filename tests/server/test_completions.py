"""/v1/completions: prompts in all forms, echo, and log-probabilities in the older shape."""

from typing import Any

import pytest

from llama_mini import LLM
from tests.server.local import Client, writing

TEXT = "/v1/completions"


def joined(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["text"] for choice in choices)


def test_prompts_in_all_forms(llm: LLM, client: Client) -> None:
    ids = llm.tokenizer.encode("Once")
    expected = [llm.generate(prompt, max_tokens=6)[0].text for prompt in ("Once", "Twice")]
    for prompt in ("Once", ids, [ids], ["Once"]):
        (choice,) = client.post(TEXT, prompt=prompt, temperature=0, max_tokens=6)["choices"]
        assert choice == {
            "index": 0,
            "text": expected[0],
            "logprobs": None,
            "finish_reason": "length",
            "prompt_token_ids": None,
            "prompt_logprobs": None,
        }
    for prompt in (["Once", "Twice"], [ids, "Twice"]):
        reply = client.post(TEXT, prompt=prompt, temperature=0, max_tokens=6)
        assert [choice["text"] for choice in reply["choices"]] == expected
        assert reply["usage"]["prompt_tokens"] == len(ids) + len(llm.tokenizer.encode("Twice"))
        assert (reply["object"], reply["id"][:5], reply["model"]) == ("text_completion", "cmpl-", "tiny")
        events = client.events(TEXT, prompt=prompt, temperature=0, max_tokens=6)
        assert [joined(events, i) for i in range(2)] == expected
        assert {event["object"] for event in events} == {"text_completion"}
    assert len(client.post(TEXT, prompt="Once", ignore_eos=True)["choices"][0]["text"]) > 0


def test_sixteen_tokens_unless_another_number_is_given(client: Client) -> None:
    assert client.post(TEXT, prompt="a", ignore_eos=True)["usage"]["completion_tokens"] == 16
    nothing = client.post(TEXT, prompt="a", max_tokens=0, return_token_ids=True)
    assert nothing["usage"]["completion_tokens"] == 0
    assert (nothing["choices"][0]["text"], nothing["choices"][0]["token_ids"]) == ("", [])


def test_special_tokens_and_truncation(llm: LLM, client: Client) -> None:
    def n(**settings: Any) -> int:
        return client.post(TEXT, prompt="abcdef", max_tokens=1, **settings)["usage"]["prompt_tokens"]

    assert (n(), n(add_special_tokens=False), n(truncate_prompt_tokens=3), n(truncate_prompt_tokens=-1)) == (7, 6, 3, 7)
    for side, text in (("left", "def"), ("right", "<|begin_of_text|>ab")):
        settings = {"truncate_prompt_tokens": 3, "truncation_side": side, "echo": True, "max_tokens": 0, "logprobs": 0}
        (choice,) = client.post(TEXT, prompt="abcdef", **settings)["choices"]
        assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == text


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_echo_with_log_probabilities(llm: LLM, client: Client, k: int, ids: bool) -> None:
    text, n = "To be", 3
    prompt = llm.tokenizer.encode(text)
    settings = {"prompt": prompt if ids else text, "echo": True, "logprobs": k, "max_tokens": n, "temperature": 0}
    (choice,) = client.post(TEXT, **settings)["choices"]
    (expected,) = llm.generate(text, max_tokens=n, prompt_logprobs=True, top_logprobs=max(k, 1))
    found = choice["logprobs"]
    shown = "<|begin_of_text|>" + text if ids else text  # a list of ids is shown with all of them
    assert choice["text"] == shown + expected.text
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"][0] is None is found["top_logprobs"][0]
    values = [*expected.prompt_logprobs[1:], *expected.logprobs]
    assert found["token_logprobs"][1:] == pytest.approx(values, abs=1e-4)
    offsets = [len("".join(found["tokens"][:i])) for i in range(len(found["tokens"]))]
    assert found["text_offset"] == offsets
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        if top is not None and token.isprintable() and token:
            assert k <= len(top) <= k + 1
            assert top[token] == value
            assert next(iter(top)) == token  # then the likeliest ones
            assert list(top.values())[1:] == sorted(list(top.values())[1:], reverse=True)
    events = client.events(TEXT, **settings)
    streamed = [event["choices"][0]["logprobs"] for event in events]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for each in streamed for value in each[key]] == found[key]
    assert joined(events) == choice["text"]


def test_log_probabilities_of_prompts(llm: LLM, client: Client) -> None:
    (expected,) = llm.generate("To be", max_tokens=1, prompt_logprobs=True, top_logprobs=3)
    ids = llm.tokenizer.encode("To be")
    chat = client.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=1, prompt_logprobs=0
    )
    assert [len(each or {}) for each in chat["prompt_logprobs"]] == [0] + [1] * (chat["usage"]["prompt_tokens"] - 1)
    for k, logprobs in ((0, None), (2, None), (3, 1)):
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": k, "logprobs": logprobs}
        (choice,) = client.post(TEXT, prompt="To be", **settings)["choices"]
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        for id, found, logprob, top in zip(
            ids[1:], rest, expected.prompt_logprobs[1:], expected.prompt_top_logprobs[1:], strict=True
        ):
            assert found.keys() == {str(id)} | {str(other) for other, _ in top[:k]}
            assert found[str(id)]["logprob"] == pytest.approx(logprob, abs=1e-4)
            assert found[str(id)]["decoded_token"] == llm.tokenizer.decode(id)
            assert [found[str(other)]["rank"] for other, _ in top[:k]] == list(range(1, k + 1))
        if logprobs:
            assert len(choice["logprobs"]["top_logprobs"][0]) in (1, 2)
    assert "not part of a stream" in client.refused(TEXT, prompt="a", stream=True, prompt_logprobs=1)["message"]


def test_ids_of_all_tokens(llm: LLM, client: Client) -> None:
    prompt, new = llm.tokenizer.encode("a"), llm.generate("a", max_tokens=6)[0].token_ids
    settings = {"temperature": 0, "max_tokens": 6, "return_token_ids": True}
    (choice,) = client.post(TEXT, prompt="a", **settings)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, new)
    choices = [event["choices"][0] for event in client.events(TEXT, prompt="a", **settings)]
    assert [id for each in choices for id in each["token_ids"]] == new
    assert [each.get("prompt_token_ids") for each in choices] == [prompt] + [None] * (len(choices) - 1)
    chat, messages = "/v1/chat/completions", [{"role": "user", "content": "a"}]
    whole = client.post(chat, messages=messages, **settings)
    assert whole["prompt_token_ids"] == client.post("/tokenize", messages=messages)["tokens"]
    first, *events = client.events(chat, messages=messages, **settings)
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in event for event in events)
    streamed = [id for event in (first, *events) for id in event["choices"][0]["token_ids"]]
    assert streamed == whole["choices"][0]["token_ids"]


def test_a_prompt_is_scored_without_an_answer(llm: LLM, client: Client) -> None:
    reply = client.post(TEXT, prompt="To be", echo=True, logprobs=0, max_tokens=0)
    (choice,) = reply["choices"]
    scores = llm.score("To be")
    assert choice["text"] == "To be"
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(scores[1:], abs=1e-4)
    assert len(choice["logprobs"]["tokens"]) == len(scores)


def test_half_characters_have_their_bytes_in_names(llm: LLM, client: Client) -> None:
    with writing(llm, "é"):
        (choice,) = client.post(TEXT, prompt="a", logprobs=0, temperature=0)["choices"]
    assert choice["logprobs"]["tokens"] == ["", "é", ""]  # the last one ends the text
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [
        ["bytes:\\xc3"],
        ["bytes:\\xa9"],
        ["<|im_end|>"],
    ]


def test_tokens_as_ids(llm: LLM, client: Client) -> None:
    settings = {"temperature": 0, "max_tokens": 2, "return_tokens_as_token_ids": True}
    (choice,) = client.post(TEXT, prompt="a", logprobs=1, **settings)["choices"]
    ids = [f"token_id:{id}" for id in llm.generate("a", max_tokens=2)[0].token_ids]
    assert choice["logprobs"]["tokens"] == ids
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [[id] for id in ids]


def test_a_prompt_that_was_there_before_is_cached_and_gives_the_same(llm: LLM, client: Client) -> None:
    """Not for another salt: the time that an answer takes must not tell what others have asked."""
    llm.forget()
    settings = {"prompt": "x" * 100, "temperature": 0, "max_tokens": 5}
    first, second, salted = (client.post(TEXT, **settings | more) for more in ({}, {}, {"cache_salt": "me"}))
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, second, salted)]
    assert cached[0] == cached[2] == 0 < cached[1] < 101
    assert first["choices"] == second["choices"] == salted["choices"]


def test_users_of_two_keys_share_no_prompt(llm: LLM) -> None:
    llm.forget()
    with Client(llm, api_keys=("one", "two")) as client:
        cached = []
        for key in ("one", "two", "two"):
            headers = {"authorization": f"Bearer {key}"}
            reply = client.post(TEXT, headers=headers, prompt="y" * 100, temperature=0, max_tokens=2)
            cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_structured_text(client: Client) -> None:
    def text(**settings: Any) -> str:
        return client.post(TEXT, prompt="a", max_tokens=60, seed=1, **settings)["choices"][0]["text"]

    assert text(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert text(structured_outputs={"regex": "[ab]{3}c"})[3] == "c"
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert "".join(text(response_format=form).split()) == '{"a":1}'
    assert text(response_format={"type": "json_object"}).lstrip().startswith("{")
    assert "".join(text(response_format={"type": "json_object", "schema": schema}).split()) == '{"a":1}'
    assert len(text(response_format={"type": "text"})) > 0
    assert "".join(text(json_schema=schema).split()) == '{"a":1}'
    assert text(grammar='root ::= "a"{5,5}') == "aaaaa"
