"""Tools: which functions a model may call, and how it must."""

from dataclasses import dataclass
from typing import Any

from llama_mini.errors import RequestError
from llama_mini.server.fields import flag
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import as_dict, check_choice, join_names, short_repr

STYLES = {  # what is in a chat template -> how its model writes calls
    "<function=": "",  # Qwen3-Coder's XML, of which arguments have no types
    "<tool_call>": "hermes",  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen
    "[TOOL_CALLS]": "mistral",  # [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}
    '"parameters": dictionary of argument': "json",  # {"name": ..., "parameters": {...}}: LLaMA 3
}
TOOL_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Tools:
    """The functions that a model may call.

    Attributes:
        names: of all functions.
        style: how calls are written: `hermes`, `mistral` or `json`; `list` for the JSON of `schema`; `arguments` if the
            text is the arguments of one function.
        only: the name of that function.
        schema: the JSON schema of the answer, if the model must call a function.
        parallel: whether it may make several calls.
    """

    names: frozenset[str]
    style: str
    only: str | None = None
    schema: dict[str, Any] | None = None
    parallel: bool = True


def tools_of(body: dict[str, Any], tokenizer: Tokenizer) -> Tools | None:
    """The tools of a chat; None without any, or with tool_choice `none`. Raises RequestError."""
    parallel, choice = flag(body, "parallel_tool_calls", True), body.get("tool_choice")
    functions = _functions(body.get("tools", []))
    if not functions:
        if choice not in (None, "none", "auto"):
            raise RequestError(f"tool_choice is {short_repr(choice)}, but there are no tools: give tools too")
        return None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if choice.get("type") == "function" and isinstance(function, dict) else None
        if not isinstance(name, str):
            expected = f'{", ".join(TOOL_CHOICES)} or {{"type": "function", "function": {{"name": ...}}}}'
            raise RequestError(f"tool_choice must be one of {expected}, not {short_repr(choice)}")
        if name not in functions:
            raise RequestError(f"tool_choice names {short_repr(name)}; the tools are {join_names(functions)}")
        return Tools(frozenset(functions), "arguments", name, {"type": "object"} | functions[name], parallel)
    check_choice("tool_choice", choice := "auto" if choice is None else choice, TOOL_CHOICES, RequestError)
    if choice == "none":
        return None
    if choice == "required":
        return Tools(frozenset(functions), "list", None, _list_of_calls(functions, parallel), parallel)
    template = tokenizer.choose_template(tools=True)
    style = next((style for mark, style in STYLES.items() if mark in template), "")
    if not style and "tools" in tokenizer.template_variables:
        do = "give tool_choice 'required' or the name of one"
        raise RequestError(f"tools: how the model of this chat template writes calls is not known; {do}")
    return Tools(frozenset(functions), style, parallel=parallel)


def _functions(tools: Any) -> dict[str, dict[str, Any]]:
    """The JSON schema of the arguments of each function. Raises RequestError for malformed ones."""
    if not isinstance(tools, list):
        raise RequestError(f"tools must be a list, not {short_repr(tools)}")
    found = []
    for i, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type", "function") == "function"
        function = tool.get("function") if is_function else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            expected = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
            raise RequestError(f"tools[{i}] must be {expected}, not {short_repr(tool)}")
        parameters = function.get("parameters")
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        if not isinstance(parameters, dict):
            raise RequestError(f"tools[{i}] has parameters that are no JSON schema: {short_repr(parameters)}")
        found.append((name, parameters))
    return as_dict("tools", found, RequestError)


def _list_of_calls(functions: dict[str, dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """The schema of one call or more. Definitions move to its top, where references in the parameters look for them."""
    calls, definitions = [], dict[str, dict[str, Any]]()
    for name, parameters in functions.items():
        parameters = dict(parameters)
        for key in ("$defs", "definitions"):
            moved = parameters.pop(key, None)
            for title, schema in moved.items() if isinstance(moved, dict) else ():
                if definitions.setdefault(key, {}).setdefault(title, schema) != schema:
                    raise RequestError(f"tools: two functions define {short_repr(title)} differently; rename one")
        call = {"name": {"const": name}, "parameters": parameters}
        calls.append({"type": "object", "properties": call, "required": [*call], "additionalProperties": False})
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, **definitions}
