"""What the server gives out as it is: the page to chat with, and the description of its API."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent


def page_routes() -> list[Route]:
    """`/` and `/openapi.yaml`: they say nothing of the model, and a browser has no key before it has the page."""
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    page = Response(html, headers=headers, media_type="text/html")
    api = Response((FOLDER / "openapi.yaml").read_text(encoding="utf-8"), media_type="application/yaml")
    return [Route("/", page, methods=["GET"]), Route("/openapi.yaml", api, methods=["GET"])]


def content_policy(html: str) -> str:
    """A Content-Security-Policy: the page's own script and style run and it asks this server, nothing else.

    Trusted types make the browser itself refuse to read a text as HTML.
    """
    sources = []
    for tag in ("script", "style"):
        (own,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {'; '.join(sources)}; {rest}; require-trusted-types-for 'script'; trusted-types 'none'"
