"""A headless Chromium for the tests of the page."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

expect.set_options(timeout=60_000)
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


HARMLESS = (
    "Failed to load resource",
    "Autofocus processing was blocked",
)  # a status above 399; another field has focus


class Chat:
    """The page in a window of its own. `problems`: what the browser complains of, and dialogs; `urls`: all it asked."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.problems: list[str] = []
        self.urls: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.goto(url)
        named_or_refused = self.page.locator("#model:not(:text-is('llama_mini')), #error:not(:empty)")
        expect(named_or_refused).to_have_count(1)  # expect needs no eval, which the page's policy forbids

    def close(self) -> list[str]:
        """What the browser complained of."""
        self.context.close()
        return [problem for problem in self.problems if not problem.startswith(HARMLESS)]

    def part(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    def field(self, name: str) -> Locator:
        return self.page.locator(f"#settings [name={name}]")

    def send(self, text: str, wait: bool = True) -> None:
        self.part("input").fill(text)
        self.page.keyboard.press("Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the answer has ended."""
        expect(self.part("log")).to_have_attribute("aria-busy", "false")

    @property
    def articles(self) -> list[str]:
        """The texts of the messages, without the notes below them."""
        return self.page.locator("article > div").all_inner_texts()

    @property
    def note(self) -> str:
        return self.page.locator(".note").last.inner_text()


Open = Callable[..., Chat]  # takes options of a browser's window
