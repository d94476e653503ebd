"""Chats as pieces of text and added tokens, by a template.

Special tokens come only from what a template itself writes. Words that look like markers (`<think>`) come from the
template and from the assistant's earlier turns. Before rendering, every other control string is broken with a mark, a
character that occurs nowhere else. After rendering, the unbroken ones become tokens, then the marks are removed.
(What a template assembles, like `'<|' + message.role + '|>'`, counts as its own.)
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from llama_mini.errors import RequestError
from llama_mini.tokenizer.backend import Backend, Found, Piece, any_of, check_text, split
from llama_mini.tokenizer.messages import Message
from llama_mini.tokenizer.sandbox import render

MAX_MESSAGES_CHARS = 8_000_000


def template_pieces(
    template: str,
    messages: list[Message],
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    backend: Backend,
    open_end: bool,
) -> list[Piece]:
    """Renders a template. Its own control strings become ids, those inside messages and variables stay text.

    `names` are the template's names of special tokens. With `open_end`, the text ends where the last message does.
    """
    try:
        as_json = json.dumps([messages, variables, names], ensure_ascii=False)
        if len(as_json) > MAX_MESSAGES_CHARS:
            raise RequestError(
                f"messages hold {len(as_json):,} characters as JSON, more than the {MAX_MESSAGES_CHARS:,}; shorten them"
            )
        mark, end = _unused_chars(template + as_json)
        marks = _Marks(backend, mark)
        marked = [marks.put(message, message["role"] == "assistant") for message in messages]
        given = {"tools": None, "documents": None, **names, **marks.put(dict(variables))}
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of 5,000 digits
        raise RequestError(f"messages cannot be written as JSON ({error}); expected plain, flat data") from error
    holder, key = marked[-1], "content"
    if isinstance(parts := holder.get(key), list) and parts:
        holder, key = parts[-1], "text"
    last = holder.get(key)
    if open_end:
        if not isinstance(last, str):
            raise RequestError("the last message has no text that continue_final_message could continue")
        holder[key] = f"{last}{end} "  # the space tells whether the template strips a message
    rendered = render(template, given | {"messages": marked})
    for char in (mark, end):
        rendered = rendered.replace(json.dumps(char)[1:-1], char)  # as tojson(ensure_ascii=true) writes it
    if open_end:
        before, shown, after = rendered.rpartition(end)
        if not shown or last.strip() not in before:
            raise RequestError("the chat template does not show the last message whole, so that it cannot be continued")
        rendered = before if after.startswith(" ") else before.rstrip()
    check_text(rendered)
    found = backend.added.find(rendered, special=True)
    pieces = split(rendered, (token for token in found if not marks.broken(rendered, token)), backend.control_ids)
    return [piece.replace(mark, "") if isinstance(piece, str) else piece for piece in pieces]


class _Marks:
    """Breaks every control string inside messages, overlapping ones and those in keys too.

    Special tokens get the mark after their first character, so they stay broken however a template cuts the text. Words
    such as `</think>` get it in front, since templates search for them in every message.
    """

    def __init__(self, backend: Backend, mark: str) -> None:
        special = {key for key, id in backend.control_ids.items() if id in backend.special_ids and len(key) > 1}
        self._mark = mark
        self._words = backend.control_ids.keys() - special
        self._special = re.compile(f"(?={any_of(special)})(.)", re.DOTALL)
        self._word = re.compile(f"(?={any_of(self._words)})")

    def put(self, value: Any, keep_words: bool = False) -> Any:
        if isinstance(value, str):
            text = value if keep_words else self._word.sub(self._mark, value)
            return self._special.sub(rf"\1{self._mark}", text)
        if isinstance(value, dict):
            return {self.put(key, keep_words): self.put(item, keep_words) for key, item in value.items()}
        if isinstance(value, list):
            return [self.put(item, keep_words) for item in value]
        return value

    def broken(self, text: str, token: Found) -> bool:
        """Whether a token that was found comes from a message: it has a mark in front, or another form."""
        if text[token.start : token.end] != token.content:
            return True
        return token.content in self._words and text[token.start - 1 : token.start] == self._mark


def _unused_chars(text: str) -> tuple[str, str]:
    """Two private-use characters that are not in the text, not even as JSON escapes."""
    used = set(text).union(chr(int(digits, 16)) for digits in re.findall(r"\\u([ef][0-9a-f]{3})", text))
    unused = [char for char in map(chr, range(0xE000, 0xF900)) if char not in used]
    if len(unused) < 2:
        raise RequestError("the messages hold every character for private use; two of them must be unused")
    return unused[0], unused[1]
