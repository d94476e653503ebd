"""How the page shows an answer: Markdown as elements, everything else as plain text, in pieces as at once."""

import json
import re

import pytest
from playwright.sync_api import Error, expect

from tests.server.browser import Chat, needs_chromium
from tests.server.stub import Stub

pytestmark = [needs_chromium, pytest.mark.slow]
LINK = 'target="_blank" rel="noopener noreferrer"'
MARKDOWN = {
    "# A *b*\ntext\n## C\n": "<h3>A <em>b</em>\n</h3><p>text\n</p><h4>C\n</h4>",
    "One\ntwo **three `x`**.\n\nFour": "<p>One\ntwo <strong>three <code>x</code></strong>.\n</p><p>Four</p>",
    "- a\n- b\n  more\n\n- c\n": "<ul><li>a\n</li><li>b\nmore\n</li><li>c\n</li></ul>",
    "1. a\n   - b\n2) c": '<ol><li value="1">a\n</li></ol><ul><li>b\n</li></ul><ol><li value="2">c</li></ol>',
    "```py\nif a < b:\n\n    # **c**\n```\nd": "<pre><code>if a &lt; b:\n\n    # **c**\n</code></pre><p>d</p>",
    "~~~\n```\n~~~": "<pre><code>```\n</code></pre>",
    "```\nnever closed": "<pre><code>never closed</code></pre>",
    "> a\n> b\n\nc\n\n***\n": "<blockquote><p>a\n</p><p>b\n</p></blockquote><p>c\n</p><hr>",
    "- - -\n* * *": "<hr><hr>",
    "[a](https://a.org/?b&c)": f'<p><a href="https://a.org/?b&amp;c" title="https://a.org/?b&amp;c" {LINK}>a</a></p>',
    "2 * 3 * 4, a_b_c, **open, `open": "<p>2 * 3 * 4, a_b_c, **open, `open</p>",
    "``` `x` ``` ``a`b``": None,
    "1999. was a year\n#hash\n-dash": '<ol><li value="1999">was a year\n#hash\n-dash</li></ol>',
    "a\u2028b \u0000c 🌍 한국어\r\nd": "<p>a\u2028b \u0000c 🌍 한국어\r\nd</p>",
}
HOSTILE = [
    "<img src=x onerror=alert(1)><script>alert(1)</script><b>bold</b>",
    "[x](javascript:alert(1)) [y](data:text/html,<script>alert(1)</script>) [z]( https://a.org)",
    "[x](javascript:location=name) [y](data:text/html,a) [z](//a.org) <https://b.org>",
    '[x](https://a.org/"onmouseover="alert(1)) [<img src=x>](https://a.org/<b>)',
    "```\n</code></pre><script>alert(1)</script>\n```",
    "&lt;b&gt; &amp; <!-- -->",
]


def body(chat: Chat) -> str:
    """The HTML of the last answer, without the spans of its tokens and without indents."""
    html = chat.page.locator("article > div").last.inner_html()
    return re.sub(r'</?span[^>]*>| style="[^"]*"', "", html)


def pieces(text: str) -> list[str]:
    """Tokens of one or two characters: each mark is cut somewhere."""
    return re.findall(r"..?", text, re.DOTALL)


@pytest.mark.parametrize("number", range(len(MARKDOWN)))
def test_markdown(number: int, stub: Stub, chat: Chat) -> None:
    text, html = list(MARKDOWN.items())[number]
    stub.tokens = pieces(text)
    chat.send("Hello")
    streamed = body(chat)
    if html is not None:
        assert streamed == html
    chat.page.reload()
    assert body(chat) == streamed
    assert json.loads(chat.page.evaluate("sessionStorage.chat"))[1]["content"] == text


def test_a_text_that_grows_is_drawn_once(stub: Stub, chat: Chat) -> None:
    stub.tokens = ["# A", "\n\nOne **tw", "o** th", "ree\n- a", "\n- b\n```\nc", "\n```\nd", "e"]
    drawn = [
        "<h3>A</h3>",
        "<h3>A\n</h3><p>One **tw</p>",
        "<h3>A\n</h3><p>One <strong>two</strong> th</p>",
        "<h3>A\n</h3><p>One <strong>two</strong> three\n</p><ul><li>a</li></ul>",
        "<h3>A\n</h3><p>One <strong>two</strong> three\n</p><ul><li>a\n</li><li>b\n</li></ul><pre><code>c</code></pre>",
    ]
    stub.held = 0
    chat.send("Hello", wait=False)
    for n, html in enumerate(drawn, 1):
        stub.held = n
        expect(chat.page.locator(".note").last).to_contain_text(f"{n} tokens ·")  # not a speed such as 14.4 tokens/s
        assert body(chat) == html
    stub.held = None
    chat.wait()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_what_the_model_writes_is_no_html(number: int, stub: Stub, chat: Chat) -> None:
    text = HOSTILE[number]
    stub.tokens = pieces(text)
    chat.send(text)
    assert set(re.findall(r"<(\w+)", body(chat))) <= {"p", "pre", "code", "a"}
    assert set(re.findall(r' (\w+)="', body(chat))) <= {"href", "title", "target", "rel", "tabindex"}
    assert all(link.startswith("https://a.org/") for link in re.findall(r'href="([^"]*)', body(chat)))
    assert chat.page.locator(".user > div").inner_text() == text
    assert chat.part("model").inner_text() == "stub <b>1</b>"


def test_the_browser_refuses_what_the_page_does_not_do(chat: Chat) -> None:
    with pytest.raises(Error, match="TrustedHTML"):
        chat.page.evaluate("document.body.innerHTML = '<b>bold</b>'")
    for script in ("fetch('https://example.org')", "import('https://example.org/a.js')"):
        with pytest.raises(Error, match="Failed to fetch"):
            chat.page.evaluate(script)
    assert any("Content Security Policy" in problem for problem in chat.problems)
    chat.problems.clear()
    chat.urls.clear()


def test_a_long_answer_stays_quick(stub: Stub, chat: Chat) -> None:
    """A pattern that looks again from each place would take minutes for these."""
    stub.tokens = [mark * 5000 for mark in ("**a", "[b](https://c", "``", "*d", "- ", "> ")]
    chat.send("Hello")
    assert len(json.loads(chat.page.evaluate("sessionStorage.chat"))[1]["content"]) == 5000 * 24
