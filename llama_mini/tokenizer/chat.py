"""Chats as pieces of text and control tokens: by the checkpoint's template, or in LLaMA 3's dialogue format.

Only what a template itself writes becomes a control token. Before rendering, each control string inside the messages is
broken with a mark, a character that occurs nowhere else. After rendering, the unbroken ones become control tokens, then
the marks are removed. (What a template assembles, like `'<|' + message.role + '|>'`, counts as its own.)
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_mini.errors import RequestError
from llama_mini.tokenizer.backend import Backend, Piece, any_of
from llama_mini.tokenizer.sandbox import render
from llama_mini.validate import short_repr

Message = dict[str, Any]
MAX_MESSAGES_CHARS = 8_000_000


def checked_messages(messages: object) -> list[Message]:
    """Messages as plain JSON data, as transformers gives them to a template. Raises RequestError for malformed ones."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages is {_describe(messages)}, expected a list of at least one message")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} is {_describe(message)}, expected a mapping with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"{where}[{key!r}] is {_describe(message.get(key))}, expected a string")
        try:
            plain = {key: value for key, value in _plain(message, where).items() if value is not None}
        except RecursionError as error:
            raise RequestError(f"{where} is nested too deeply") from error
        reasoning = next((plain[key] for key in ("reasoning_content", "thinking", "reasoning") if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning} | plain | {"reasoning_content": reasoning}
        checked.append(plain)
    return checked


def template_pieces(
    template: str, messages: list[Message], names: Mapping[str, str], backend: Backend, prompt: bool
) -> list[Piece]:
    """Renders a template. Its own control strings become ids, those inside the messages stay text."""
    control_ids = backend.control_ids
    try:
        as_json = json.dumps([messages, dict(names)], ensure_ascii=False)
        if len(as_json) > MAX_MESSAGES_CHARS:
            raise RequestError(
                f"messages hold {len(as_json):,} characters as JSON, more than the {MAX_MESSAGES_CHARS:,} that a chat "
                "template may get; shorten them"
            )
        marks = _Marks(backend, _unused_char(template + as_json))
        variables = {**names, "messages": marks.put(messages), "tools": None, "documents": None}
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of 5,000 digits
        raise RequestError(f"messages cannot be written as JSON ({error}); expected plain, flat data") from error
    rendered = render(template, variables | {"add_generation_prompt": prompt})
    rendered = rendered.replace(_escaped(marks.mark), marks.mark)  # as tojson(ensure_ascii=true) writes it
    return [
        control_ids[part] if index % 2 else part.replace(marks.mark, "")
        for index, part in enumerate(marks.unmarked.split(rendered))
        if part
    ]


def llama_3_pieces(messages: list[Message], control_ids: Mapping[str, int], prompt: bool) -> list[Piece]:
    """The dialogue of Meta's llama3/chat_format.py. Contents are not stripped, unlike in the template on the hub."""
    begin, end, eot = (control_ids[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id"))
    pieces: list[Piece] = [control_ids["<|begin_of_text|>"]]
    for message in messages:
        role = "ipython" if message["role"] == "tool" else message["role"]
        pieces += [begin, role, end, "\n\n", message["content"], eot]
    return [*pieces, begin, "assistant", end, "\n\n"] if prompt else pieces


def _plain(value: object, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RequestError(f"{where:.200} is {_describe(value)}, expected plain JSON data")


def _describe(value: object) -> str:
    return "missing" if value is None else f"{type(value).__name__} {short_repr(value):.60}"


class _Marks:
    """Breaks every control string inside messages, overlapping ones and those in keys too.

    Special tokens get the mark after their first character, so they stay broken however a template cuts the text. Other
    control tokens, such as `</think>`, get it in front, since templates search for them in the model's earlier turns.
    """

    def __init__(self, backend: Backend, mark: str) -> None:
        special = {key for key, id in backend.control_ids.items() if id in backend.special_ids and len(key) > 1}
        other = backend.control_ids.keys() - special
        self.mark = mark
        self._special = re.compile(f"(?={any_of(special)})(.)", re.DOTALL)
        self._other = re.compile(f"(?={any_of(other)})")
        self.unmarked = re.compile(f"({any_of(special | other, dict.fromkeys(other, f'(?<!{mark})'))})")

    def put(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(rf"\1{self.mark}", self._other.sub(self.mark, value))
        if isinstance(value, dict):
            return {self.put(key): self.put(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.put(item) for item in value]
        return value


def _unused_char(text: str) -> str:
    """A private-use character that is not in the text, not even as a JSON escape."""
    used = set(text).union(chr(int(digits, 16)) for digits in re.findall(r"\\u([ef][0-9a-f]{3})", text))
    for char in map(chr, range(0xE000, 0xF900)):
        if char not in used:
            return char
    raise RequestError("the messages hold every character for private use; one of them must be unused")


def _escaped(char: str) -> str:
    return json.dumps(char)[1:-1]
