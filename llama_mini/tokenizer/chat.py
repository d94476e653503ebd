"""Chats: the checkpoint's own template, or LLaMA 3's dialogue format where Meta's files have none.

Only the markers that a template writes itself become control tokens. Control strings inside the messages are marked
with a character that occurs nowhere else, the template is rendered, and what is marked stays text. (A template that
itself joins a marker out of a message's parts, as `'<|' + message.role + '|>'` does, has written it.)
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from llama_mini.errors import RequestError, TokenizerError
from llama_mini.tokenizer.backend import Backend, Piece

Message = dict[str, Any]


def checked_messages(messages: object) -> list[Message]:
    """Messages as plain JSON data, as transformers hands them to a template; RequestError when they are malformed."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages is {_shown(messages)}, expected a list of at least one message")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} is {_shown(message)}, expected a mapping with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"{where}[{key!r}] is {_shown(message.get(key))}, expected a string")
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
    """Render a template. Its control strings come back as ids, those inside the messages as text."""
    control_ids = backend.control_ids
    everything = template + json.dumps([messages, dict(names)], ensure_ascii=False)
    marks = _Marks(backend, _unused_char(everything))
    variables = {**names, "messages": marks.put(messages), "tools": None, "documents": None}
    rendered = render(template, variables | {"add_generation_prompt": prompt})
    rendered = rendered.replace(_escaped(marks.mark), marks.mark)  # by tojson(ensure_ascii=true)
    return [
        control_ids[part] if index % 2 else part.replace(marks.mark, "")
        for index, part in enumerate(marks.unmarked.split(rendered))
        if part
    ]


def llama_3_pieces(messages: list[Message], control_ids: Mapping[str, int], prompt: bool) -> list[Piece]:
    """The dialogue of Meta's llama3/chat_format.py. Contents stay as they are; the template on the hub strips them."""
    begin, end, eot = (control_ids[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id"))
    pieces: list[Piece] = [control_ids["<|begin_of_text|>"]]
    for message in messages:
        role = "ipython" if message["role"] == "tool" else message["role"]
        pieces += [begin, role, end, "\n\n", message["content"], eot]
    return [*pieces, begin, "assistant", end, "\n\n"] if prompt else pieces


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a Jinja template in a sandbox, as transformers does; plain data in, TokenizerError for all that fails.

    The sandbox keeps a template from Python's internals. It bounds neither memory nor time.
    """
    try:
        return _compiled(template).render(**variables)
    except Exception as error:  # a template is a program: it fails in every way that Python can
        raise TokenizerError(f"the chat template failed: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _TemplateDict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


class _TemplateDict:
    """`dict` as a template may use it: to make dictionaries, with no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is legal
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which starts with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: object, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RequestError(f"{where} is {_shown(value)}, expected plain JSON data")


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}" if value is not None else "missing"


def _any_of(contents: Iterable[str], conditions: Mapping[str, str] = MappingProxyType({})) -> str:
    """A pattern for any of the contents, the longest first; it matches nothing when there are none."""
    longest_first = sorted(contents, key=len, reverse=True)
    return "|".join(conditions.get(content, "") + re.escape(content) for content in longest_first) or "(?!)"


class _Marks:
    """Breaks the control strings inside messages, wherever one starts: overlapping ones too, and in keys.

    Special ones get the mark behind their first character: however a template cuts the text, they stay broken. The
    others, such as `</think>`, get it in front, since templates look for them in what the model said before.
    """

    def __init__(self, backend: Backend, mark: str) -> None:
        special = {key for key, id in backend.control_ids.items() if id in backend.special_ids and len(key) > 1}
        other = backend.control_ids.keys() - special
        self.mark = mark
        self._special = re.compile(f"(?={_any_of(special)})(.)", re.DOTALL)
        self._other = re.compile(f"(?={_any_of(other)})")
        self.unmarked = re.compile(f"({_any_of(special | other, dict.fromkeys(other, f'(?<!{mark})'))})")

    def put(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(rf"\1{self.mark}", self._other.sub(self.mark, value))
        if isinstance(value, dict):
            return {self.put(key): self.put(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.put(item) for item in value]
        return value


def _unused_char(text: str) -> str:
    """A character for private use that stands nowhere in the text, nor does its escape in JSON."""
    used = set(text)
    for char in map(chr, range(0xE000, 0xF900)):
        if char not in used and _escaped(char) not in text:
            return char
    raise RequestError("the messages hold every character for private use; at least one has to be free")


def _escaped(char: str) -> str:
    return json.dumps(char)[1:-1]
