"""The page to chat with, in a headless Chromium, before a server whose answers are written here."""

import re

import pytest
from playwright.sync_api import expect
from starlette.responses import JSONResponse, PlainTextResponse

from tests.server.browser import Chat, Open, needs_chromium
from tests.server.stub import MODEL, Stub, choice, data

pytestmark = [needs_chromium, pytest.mark.slow]


def test_an_answer_comes_as_it_is_written(stub: Stub, chat: Chat) -> None:
    stub.held = 2
    chat.send("How are you?", wait=False)
    expect(chat.page.locator(".token")).to_have_count(2)
    assert chat.articles == ["How are you?", "Fine, and"]
    assert chat.part("send").inner_text() == "Stop"
    assert chat.part("log").get_attribute("aria-busy") == "true"
    stub.held = None
    chat.wait()
    assert chat.articles == ["How are you?", "Fine, and you?"]
    assert re.fullmatch(r"4 tokens · first in \d+ ms · [\d.]+ tokens/s", chat.note)
    assert stub.asked == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "How are you?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 5,
            "temperature": 0.7,
            "top_p": 0.95,
        }
    ]
    chat.send("And now?")
    turns = ("How are you?", "Fine, and you?", "And now?")
    assert [(turn["role"], turn["content"]) for turn in stub.asked[1]["messages"]] == [
        *zip(("user", "assistant", "user"), turns, strict=True)
    ]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_the_text(how: str, stub: Stub, chat: Chat) -> None:
    stub.held = 2
    chat.send("Hello", wait=False)
    expect(chat.page.locator(".token")).to_have_count(2)
    chat.part("send").click() if how == "button" else chat.page.keyboard.press("Escape")
    chat.wait()
    assert stub.left.wait(30)
    assert chat.articles == ["Hello", "Fine, and"]
    assert chat.note.endswith("· stopped")
    stub.held = None
    chat.send("Again")
    assert chat.articles[-1] == "Fine, and you?"


def test_the_probabilities_of_a_token(stub: Stub, chat: Chat) -> None:
    chat.send("Hello")
    tip, tokens = chat.part("tip"), chat.page.locator(".token")
    assert not tip.is_visible()
    tokens.nth(1).hover()
    assert tip.inner_text().split("\n") == [
        *(",␣and", "50.0 %", "␣<i>↵", "2.0 %", "other", "1.0 %", "⇥", "0.1 %", "x", "<0.1 %")
    ]
    assert chat.page.locator("#tip .chosen code").all_inner_texts() == [",␣and"]
    tokens.nth(2).hover()  # not one of the likeliest: it comes after them
    assert chat.page.locator("#tip code").all_inner_texts() == ["instead", "␣<i>↵", "other", "⇥", "x", "␣you?"]
    assert chat.page.locator("#tip .chosen").inner_text().split("\n") == ["␣you?", "<0.1 %"]
    chat.part("input").hover()
    assert not tip.is_visible()
    chat.part("log").focus()
    chat.page.keyboard.press("Tab")
    assert chat.page.locator("#tip .chosen code").inner_text() == "Fine"
    chat.page.keyboard.press("ArrowRight")
    assert chat.page.locator("#tip .chosen code").inner_text() == ",␣and"
    assert tokens.nth(1).get_attribute("aria-describedby") == "tip"
    chat.page.keyboard.press("ArrowLeft")
    assert chat.page.evaluate("document.activeElement.textContent") == "Fine"
    chat.page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_settings_are_sent_and_live_as_long_as_the_tab(stub: Stub, chat: Chat) -> None:
    chat.page.locator("summary").click()
    given = {"system": "Be brief.", "temperature": "0", "top_p": "0.5", "max_completion_tokens": "7", "seed": "3"}
    for name, value in given.items():
        chat.field(name).fill(value)
    chat.send("Hello")
    sent = stub.asked[-1]
    assert {name: sent[name] for name in given if name != "system"} == {
        "temperature": 0, "top_p": 0.5, "max_completion_tokens": 7, "seed": 3,
    }  # fmt: skip
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    chat.page.reload()
    assert {name: chat.field(name).input_value() for name in given} == given
    assert chat.articles == ["Hello", "Fine, and you?"]
    assert chat.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    chat.field("top_p").evaluate("field => field.value = '1.5'")
    chat.send("Not sent", wait=False)
    assert chat.field("top_p").evaluate("field => field.matches(':invalid')")
    assert len(stub.asked) == 1


def test_a_key_is_asked_for_where_the_server_wants_one(stub: Stub, opened: Open) -> None:
    stub.key = "secret"
    chat = opened()
    assert chat.part("error").inner_text() == "The server asks for an API key."
    assert chat.page.evaluate("document.activeElement.name") == "key"
    for key, sentence in (("wrong", "The server does not know this API key."), ("secret", "")):
        chat.field("key").fill(key)
        chat.field("key").press("Tab")
        expect(chat.part("error")).to_have_text(sentence)
    assert chat.part("model").inner_text() == MODEL
    chat.send("Hello")
    assert chat.articles[-1] == "Fine, and you?"


REFUSALS = {
    "busy": (JSONResponse({"error": {"message": "the queue is full"}}, 503, {"Retry-After": "2"}),
             "the queue is full: try again in 2 s"),
    "wrong": (JSONResponse({"error": {"message": "seed <b>is</b> wrong"}}, 400), "seed <b>is</b> wrong"),
    "proxy": (PlainTextResponse("Bad gateway", 502), "The server answers with status 502"),
}  # fmt: skip
ENDS = {
    "error": ([data({"error": {"message": "logits are NaN"}})], "logits are NaN"),
    "cut": ([": ping\n\n"], "The connection ended before the answer did."),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_one_sentence_and_the_question_stays(kind: str, stub: Stub, chat: Chat) -> None:
    stub.refusal, sentence = REFUSALS[kind]
    chat.send("Hello")
    assert chat.part("error").inner_text() == sentence
    assert chat.articles == ["Hello"]
    stub.refusal = None
    chat.part("again").click()
    expect(chat.page.locator("article:nth-child(2) .token[tabindex='0']")).to_have_count(1)
    assert chat.articles == ["Hello", "Fine, and you?"]
    assert chat.part("error").inner_text() == ""


@pytest.mark.parametrize("kind", ENDS)
def test_a_stream_that_breaks_keeps_its_text(kind: str, stub: Stub, chat: Chat) -> None:
    stub.end, sentence = ENDS[kind]
    chat.send("Hello")
    assert chat.part("error").inner_text() == sentence
    assert chat.articles == ["Hello", "Fine, and you?"]
    assert chat.note.endswith("· incomplete")


def test_the_server_is_gone(stub: Stub, chat: Chat) -> None:
    chat.context.set_offline(True)
    chat.send("Hello")
    assert chat.part("error").inner_text() == "The server does not answer: is it up?"
    assert chat.articles == ["Hello"]


def test_the_last_turn_is_answered_again_edited_and_left(stub: Stub, chat: Chat) -> None:
    chat.send("One")
    stub.tokens = ["Cut", " off"]
    stub.end = [choice({}, reason="length"), "data: [DONE]\n\n"]
    chat.part("again").click()
    expect(chat.page.locator(".note").last).to_contain_text("cut")
    assert chat.articles == ["One", "Cut off"]
    assert chat.note.endswith("· cut at the maximum of tokens")
    chat.part("edit").click()
    assert chat.articles == []
    assert chat.part("input").input_value() == "One"
    stub.held = 1
    chat.send("Two", wait=False)
    chat.page.wait_for_selector(".token")
    chat.part("new").click()
    assert stub.left.wait(30)
    assert chat.articles == []
    stub.held, stub.end = None, None
    chat.send("Three")
    assert chat.articles == ["Three", "Cut off"]
    assert [len(body["messages"]) for body in stub.asked] == [1, 1, 1, 1]


def test_keys_of_the_input(stub: Stub, chat: Chat) -> None:
    chat.part("input").fill("One")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("Two")
    composing = (
        "field => field.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    chat.part("input").evaluate(composing)  # as an input method for Korean sends it
    assert stub.asked == []
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_selector(".token")
    assert stub.asked[0]["messages"][0]["content"] == "One\nTwo"
    chat.send("  ")
    assert len(stub.asked) == 1


def test_it_fits_a_phone(stub: Stub, opened: Open) -> None:
    stub.tokens = ["```\n", "x" * 300, "\n```\n", "y" * 300]
    chat = opened(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    chat.send("z" * 300)
    chat.page.locator("summary").click()
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 390
    chat.page.locator(".token").last.tap()
    box = chat.part("tip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
