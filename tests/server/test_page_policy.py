"""The page as it is sent: its policy fits it, and it is alone."""

import base64
import hashlib
import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llama_mini.server.page import FOLDER, content_policy, page_routes

HTML = (FOLDER / "page.html").read_text(encoding="utf-8")


def test_the_policy_lets_only_the_page_s_own_script_and_style_run() -> None:
    reply = TestClient(Starlette(routes=page_routes())).get("/")
    assert reply.text == HTML
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        own = HTML[HTML.index(">", HTML.index(f"<{tag}")) + 1 : HTML.index(f"</{tag}>")]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    with pytest.raises(ValueError, match="too many values"):
        content_policy(HTML + "<script>alert(1)</script>")


def test_the_page_is_one_file_of_300_lines_that_asks_only_its_server() -> None:
    assert len(HTML.splitlines()) <= 300
    assert re.findall(r"https?://(?!\[)[\w.]+", HTML.replace(r"https?:\/\/", "")) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie", HTML) == []
    assert re.findall(r'(?:ask|fetch)\("?([\w/.]+)', HTML) == ["path", "path", "v1/chat/completions", "v1/models"]
