"""The messages and variables of a chat, in the forms of OpenAI's API, vLLM and transformers, as plain data."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from llama_mini.errors import RequestError
from llama_mini.validate import short_repr

Message = dict[str, Any]
TOOL_ROLES = ("tool", "ipython", "function")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> its text
_ASKS_FOR_NULL = re.compile(r"""\bcontent['"]?\]? is none(?! or)""")  # DeepSeek's distilled LLaMA
_WRITES_TEXT = re.compile(r"""(\.|\[['"])arguments(['"]\])?\s*([+~]|-?\}\})""")  # or joins them with a string
_TAKES_BOTH = re.compile(r"""\barguments['"]?\]? is (string|mapping)""")
# Keywords of transformers that shape the result, with the value that means what happens here.
_FIXED = {"tokenize": True, "return_dict": False, "return_tensors": None, "padding": False, "truncation": False}


def checked_messages(messages: object, template: str = "", form: str = "text") -> list[Message]:
    """Messages as plain JSON data, as vLLM gives them to a template. Raises RequestError for malformed ones.

    Dataclasses and pydantic models work too. `form` is what the template takes as content: for "text", text parts are
    joined with newlines; for "parts", a string becomes a part; "either" takes both as they are. An assistant's turn
    without content has an empty one, or null for a template that asks for null. Arguments of tool calls that are JSON
    text, the form of OpenAI, become objects, unless the template writes them as text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages is {_describe(messages)}, expected a list of at least one message")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not _has_fields(message):
            raise RequestError(f"{where} is {_describe(message)}, expected a mapping with role and content")
        plain = {key: value for key, value in _plain(message, where).items() if value is not None}
        _check_role_and_content(plain, where, form)
        if plain.get("tool_calls"):
            _check_tool_calls(plain, where, template)
        if "content" not in plain:
            plain["content"] = None if _ASKS_FOR_NULL.search(template) else ""
        reasoning = next((plain[key] for key in ("reasoning_content", "thinking", "reasoning") if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning} | plain | {"reasoning_content": reasoning}
        checked.append(plain)
    return checked


def checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that are given, as plain JSON data; None is not given. Raises RequestError for malformed ones.

    `chat_template_kwargs`, as in vLLM, holds further ones.
    """
    more = variables.get("chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise RequestError(f"chat_template_kwargs is {_describe(more)}, expected a mapping")
    given = {name: value for name, value in (dict(variables) | dict(more)).items() if value is not None}
    given.pop("chat_template_kwargs", None)
    for name in _FIXED.keys() & given.keys():
        if (value := given.pop(name)) is not _FIXED[name]:
            do = "for a tensor, write torch.tensor([ids]), for the text, decode the ids with skip_special_tokens=False"
            raise RequestError(f"{name} is {short_repr(value)}, but the result is a list of all ids; {do}")
    for name in ("tools", "documents"):
        items = given.get(name, [])
        if not isinstance(items, list | tuple):
            raise RequestError(f"{name} is {_describe(items)}, expected a list")
        for index, item in enumerate(items):
            if not _has_fields(item):
                schema = ", such as transformers.utils.get_json_schema makes of a function" if callable(item) else ""
                raise RequestError(f"{name}[{index}] is {_describe(item)}, expected a mapping{schema}")
    return {name: _plain(value, name) for name, value in given.items()}


def _check_role_and_content(message: Message, where: str, form: str) -> None:
    """Gives the content the form of the template. An assistant may call tools, refuse or think without any content."""
    role, content, where_content = message.get("role"), message.get("content"), f"{where}['content']"
    if not isinstance(role, str):
        raise RequestError(f"{where}['role'] is {_describe(role)}, expected a string")
    if isinstance(content, list):
        parts = [_part(part, f"{where_content}[{i}]") for i, part in enumerate(content)]
        message["content"] = "\n".join(part["text"] for part in parts) if form == "text" else parts
        return
    if isinstance(content, str) and form == "parts":
        message["content"] = [_part(content, where_content)]
        return
    silent = content is None and role == "assistant" and message.keys() - {"role", "name"}
    if not isinstance(content, str) and not silent and not (isinstance(content, dict) and role in TOOL_ROLES):
        raise RequestError(f"{where_content} is {_describe(content)}, expected a string or a list of text parts")


def _part(part: Any, where: str) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, dict) else None
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        found = f"a part of type {kind!r:.60}" if isinstance(kind, str) else _describe(part)
        raise RequestError(f"{where} is {found}; this model reads text alone: give a part of type 'text'")
    if not isinstance(part.get(key), str):
        raise RequestError(f"{where}[{key!r}] is {_describe(part.get(key))}, expected a string")
    return part | {"type": "text", "text": part[key]}


def _check_tool_calls(message: Message, where: str, template: str) -> None:
    if "tool_calls" not in template:
        raise RequestError(f"{where} has tool_calls, which the chat template does not read; write them as content")
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise RequestError(f"{where}['tool_calls'] is {_describe(calls)}, expected a list")
    as_text = _WRITES_TEXT.search(template) and not _TAKES_BOTH.search(template)
    for index, call in enumerate(calls):
        place = f"{where}['tool_calls'][{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise RequestError(f"{place} is {_describe(call)}, expected a mapping with function")
        if isinstance(arguments := function.get("arguments"), str) and not as_text:
            try:
                function["arguments"] = json.loads(arguments or "{}")
            except ValueError as error:
                raise RequestError(
                    f"{place}: its arguments, {short_repr(arguments)}, are not JSON ({error})"
                ) from error


def _plain(value: Any, where: str) -> Any:
    """The value as exact JSON types: a template must not reach the methods of any other."""
    try:
        return _exact(value, where)
    except RecursionError as error:
        raise RequestError(f"{where} is nested too deeply") from error


def _exact(value: Any, where: str) -> Any:
    for kind, convert in _SCALARS.items():
        if isinstance(value, kind):
            return convert(value)
    if isinstance(value, np.generic):
        return _exact(value.item(), where)
    if _has_fields(value):
        data = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else value
        data = data if isinstance(data, Mapping) else data.model_dump()  # pydantic's
        if all(isinstance(key, str) for key in data):
            return {str.__str__(key): _exact(item, f"{where}[{key!r}]") for key, item in data.items()}
    if isinstance(value, list | tuple):
        return [_exact(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RequestError(f"{where:.200} is {_describe(value)}, expected plain JSON data")


def _has_fields(value: Any) -> bool:
    """Whether a value is a mapping, a dataclass or a pydantic model."""
    kinds = isinstance(value, Mapping) or is_dataclass(value) or callable(getattr(value, "model_dump", None))
    return kinds and not isinstance(value, type)


def _describe(value: object) -> str:
    return "missing" if value is None else f"{type(value).__name__} {short_repr(value):.60}"


# Subclasses, such as enumerations, become the type itself.
_SCALARS: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: None,
    bool: bool,
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
}
