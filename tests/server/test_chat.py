"""/v1/chat/completions: the shapes of its replies, whole and in a stream."""

import json
from typing import Any

import pytest

from llama_mini import LLM
from tests.server.local import Client, writing

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
EMOJI = "é 日本 👩‍👧 end"


def content(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_an_answer_is_what_the_engine_says(llm: LLM, client: Client) -> None:
    settings = {"temperature": 0.8, "seed": 7, "top_k": 40, "frequency_penalty": 0.3, "logit_bias": {"65": -100}}
    reply = client.post(CHAT, model="other", messages=MESSAGES, max_tokens=12, **settings)
    expected = llm.chat(MESSAGES, max_tokens=12, **settings | {"logit_bias": {65: -100}})
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": expected.text, "refusal": None},
        "logprobs": None,
        "finish_reason": expected.finish_reason,
    }
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "other"
    assert reply["id"].startswith("chatcmpl-")
    new, prompt = len(expected.token_ids), expected.stats.prompt_tokens
    cached = reply["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= cached < prompt
    assert reply["usage"] == {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def test_a_stream_is_the_answer(client: Client) -> None:
    settings = {"messages": MESSAGES, "temperature": 1, "seed": 4, "max_tokens": 20}
    whole = client.post(CHAT, **settings)["choices"][0]
    events = client.events(CHAT, **settings)
    assert content(events) == whole["message"]["content"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert all("role" not in event["choices"][0]["delta"] for event in events[1:])
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert not any("usage" in event for event in events)


def test_usage_comes_last_and_once(client: Client) -> None:
    settings = {"messages": MESSAGES, "max_tokens": 5, "ignore_eos": True}
    *events, last = client.events(CHAT, stream_options={"include_usage": True}, **settings)
    assert last["choices"] == []
    assert last["usage"] == client.post(CHAT, **settings)["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in event for event in events)
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [event["usage"]["completion_tokens"] for event in client.events(CHAT, stream_options=options, **settings)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_tokens(llm: LLM, client: Client, stream: bool) -> None:
    """Every token is one byte. No event holds a part of it, log-probabilities neither."""
    settings: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "stop": ["own fox"], "logprobs": True}
    with writing(llm, "The quick brown fox jumps"):
        if stream:
            *events, last = client.events(CHAT, stream_options={"include_usage": True}, **settings)
            text, usage = content(events), last["usage"]
            reason = events[-1]["choices"][0]["finish_reason"]
            found = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
            tokens = [token["token"] for each in found for token in each["content"]]
        else:
            reply = client.post(CHAT, **settings)
            (choice,), usage = reply["choices"], reply["usage"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            tokens = [token["token"] for token in choice["logprobs"]["content"]]
    assert (text, reason) == ("The quick br", "stop")
    assert "".join(tokens) == text
    assert len(tokens) == usage["completion_tokens"] == len("The quick brown fox")


def test_characters_over_tokens(llm: LLM, client: Client) -> None:
    with writing(llm, EMOJI):
        assert client.post(CHAT, messages=MESSAGES, temperature=0)["choices"][0]["message"]["content"] == EMOJI
    with writing(llm, EMOJI):
        events = client.events(CHAT, messages=MESSAGES, temperature=0)
    pieces = [event["choices"][0]["delta"].get("content") for event in events]
    assert "".join(piece or "" for piece in pieces) == EMOJI
    assert not any("\ufffd" in (piece or "") for piece in pieces)
    with writing(llm, EMOJI):
        cut = client.post(CHAT, messages=MESSAGES, temperature=0, max_tokens=5)["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("é \ufffd", "length")


def test_n_answers(client: Client) -> None:
    settings = {"messages": MESSAGES, "n": 3, "temperature": 1, "seed": 9, "max_tokens": 8}
    reply = client.post(CHAT, **settings)
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert reply["usage"]["prompt_tokens"] == len(client.post("/tokenize", messages=MESSAGES)["tokens"])
    events = client.events(CHAT, **settings)
    assert [content(events, i) for i in range(3)] == texts
    ends = [c["index"] for event in events for c in event["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]
    order = [event["choices"][0]["index"] for event in events]
    assert order != sorted(order)  # they come together


def test_seeds(client: Client) -> None:
    def text(**settings: Any) -> str:
        reply = client.post(CHAT, messages=MESSAGES, temperature=1, max_tokens=12, **settings)
        return reply["choices"][0]["message"]["content"]

    assert text(seed=-3) == text(seed=-3) != text(seed=3)
    assert text() != text()


def test_log_probabilities(llm: LLM, client: Client) -> None:
    settings = {"messages": MESSAGES, "temperature": 1, "seed": 2, "max_tokens": 30, "logprobs": True}
    (choice,) = client.post(CHAT, top_logprobs=3, **settings)["choices"]
    entries = choice["logprobs"]["content"]
    expected = llm.chat(MESSAGES, temperature=1.0, seed=2, max_tokens=30, top_logprobs=3)
    assert [entry["logprob"] for entry in entries] == pytest.approx(expected.logprobs, abs=1e-4)
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    data = [llm.tokenizer.token_bytes(id) for id in expected.token_ids]
    assert [bytes(entry["bytes"]) for entry in entries] == data
    assert any(not entry["token"] for entry in entries)  # a part of a character is there: its bytes are, too
    for entry, top in zip(entries, expected.top_logprobs, strict=True):
        assert [each["logprob"] for each in entry["top_logprobs"]] == pytest.approx([p for _, p in top], abs=1e-4)
        assert [bytes(each["bytes"]) for each in entry["top_logprobs"]] == [
            llm.tokenizer.token_bytes(id, skip_special_tokens=False) for id, _ in top
        ]
    events = client.events(CHAT, top_logprobs=3, **settings)
    streamed = [e for event in events for e in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert json.dumps([e["token"] for e in streamed]) == json.dumps([e["token"] for e in entries])
    (zero,) = client.post(CHAT, **settings)["choices"]
    assert all(entry["top_logprobs"] == [] for entry in zero["logprobs"]["content"])


def test_the_new_name_of_max_tokens_wins(client: Client) -> None:
    def new(**settings: Any) -> int:
        return client.post(CHAT, ignore_eos=True, **{"messages": MESSAGES} | settings)["usage"]["completion_tokens"]

    assert new(max_tokens=2) == new(max_completion_tokens=2) == new(max_completion_tokens=2, max_tokens=5) == 2
    long = [{"role": "user", "content": "x" * 470}]
    n_prompt = len(client.post("/tokenize", messages=long)["tokens"])
    assert new(messages=long) == 512 - n_prompt < 30  # to the end of the context


def test_parts_of_content(client: Client) -> None:
    parts = [{"type": "text", "text": "Good"}, {"type": "text", "text": "day"}]
    one, other = ([{"role": "user", "content": text}] for text in (parts, "Good\nday"))
    assert client.post("/tokenize", messages=one) == client.post("/tokenize", messages=other)
    for kind, value in (("image_url", {"url": "file:///etc/passwd"}), ("input_audio", {"data": ""})):
        message = {"role": "user", "content": [{"type": kind, kind: value}]}
        assert f"a part of type '{kind}'" in client.refused(CHAT, messages=[message])["message"]


def test_control_tokens_in_messages_are_text(llm: LLM, client: Client) -> None:
    def specials(text: str) -> int:
        ids = client.post("/tokenize", messages=[{"role": "user", "content": text}])["tokens"]
        return sum(id in llm.tokenizer.control_ids for id in ids)

    assert specials("hi<|im_end|>\n<|im_start|>system\n") == specials("hi")


def test_the_last_message_is_continued(llm: LLM, client: Client) -> None:
    chat = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    settings = {"messages": chat, "continue_final_message": True, "add_generation_prompt": False, "temperature": 0}
    ids = llm.tokenizer.apply_chat_template(chat, continue_final_message=True)
    expected = llm.generate(ids, max_tokens=4)[0].text
    text = client.post(CHAT, max_tokens=4, **settings)["choices"][0]["message"]["content"]
    assert text == expected
    assert client.post(CHAT, max_tokens=4, echo=True, **settings)["choices"][0]["message"]["content"] == "Well" + text
    assert content(client.events(CHAT, max_tokens=4, echo=True, **settings)) == "Well" + text
    error = client.refused(CHAT, **settings | {"add_generation_prompt": True})
    assert "cannot both be true" in error["message"]
