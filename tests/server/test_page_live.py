"""The page before the real server, with a key."""

from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from llama_mini import LLM
from llama_mini.server.app import create_app
from llama_mini.server.settings import Settings
from tests.server.browser import Chat, needs_chromium
from tests.server.live import serving

pytestmark = [needs_chromium, pytest.mark.slow]
QUESTION = "Why is the sky blue?"


def test_a_chat_with_the_real_server(tiny_dir: Path, browser: Browser) -> None:
    settings = Settings(model_names=("tiny",), api_keys=("secret",))
    with serving(create_app(LLM(tiny_dir, kernels="off"), settings), settings) as (_, port):
        url = f"http://127.0.0.1:{port}/"
        chat = Chat(browser, url)
        assert chat.part("error").inner_text() == "The server asks for an API key."
        chat.field("key").fill("secret")
        chat.field("temperature").fill("0")
        chat.field("max_completion_tokens").fill("40")
        expect(chat.part("model")).to_have_text("tiny")
        chat.send(QUESTION)
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40}
        reply = httpx.post(f"{url}v1/chat/completions", json=body, headers={"Authorization": "Bearer secret"}).json()
        assert (
            chat.page.evaluate("JSON.parse(sessionStorage.chat)[1].content")
            == reply["choices"][0]["message"]["content"]
        )
        assert chat.note.startswith("40 tokens")
        assert chat.note.endswith("cut at the maximum of tokens")
        assert chat.page.locator(".token").count() > 5
        chat.page.locator(".token").first.hover()
        assert chat.page.locator("#tip div").count() in (5, 6)
        assert chat.close() == []
