"""What the tests of the report read: a page that was parsed and checked."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HOSTILE = "\"><script>alert(1)</script>&'\x00"


class Page(HTMLParser):
    """Checks that every element is closed in turn, and collects ids, links, headings, text and scripts.

    data: what the script of type application/json holds. code: that of the other script.
    """

    data: Any

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.headings: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.code = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.scripts += [values] if tag == "script" else []
        self.ids += [str(values["id"])] if "id" in values else []
        self.links += [str(values[name]) for name in ("href", "src", "xlink:href") if name in values]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.scripts[-1].get("type") == "application/json":
                self.data = json.loads(data)
            else:
                self.code += data
        elif "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


class HostileTokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return HOSTILE
