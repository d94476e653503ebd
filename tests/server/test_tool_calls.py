"""Calls of tools in what a model writes: found however the text is cut, and nothing is lost."""

import random
from types import SimpleNamespace

import pytest

from llama_mini.server.tool_calls import Part, ToolCalls
from llama_mini.server.tools import Tools

NAMES = frozenset({"weather", "time"})
CITY = '{"city": "Zürich", "note": "a \\"}\\" and ]", "days": [1, {"more": []}]}'
HERMES = f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
TWO = HERMES + '\n<tool_call>\n{"arguments": {}, "name": "time"}\n</tool_call>'
ADA = '{"name": "Ada", "parameters": {"a": 1}} is one'
CASES = {  # style, text -> text and calls
    "hermes": ("hermes", HERMES, "Let me see.", [("weather", CITY)]),
    "hermes, two, the second with its name last": ("hermes", TWO, "Let me see.", [("weather", CITY), ("time", "{}")]),
    "hermes, text after": ("hermes", HERMES + " Done", "Let me see. Done", [("weather", CITY)]),
    "hermes, no end": ("hermes", HERMES[: -len("</tool_call>")], "Let me see.", [("weather", CITY)]),
    "hermes, only text": ("hermes", " a < b <tool_", " a < b <tool_", []),
    "hermes, broken": ("hermes", "<tool_call>weather()</tool_call>", "<tool_call>weather()</tool_call>", []),
    "hermes, no name": ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "hermes, arguments as text": (
        "hermes",
        '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("time", '{"a": 1}')],
    ),
    "hermes, unknown": ("hermes", '<tool_call>{"name": "x", "arguments": {}}</tool_call>', "", [("x", "{}")]),
    "mistral": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CITY}}}, {{"name": "time", "arguments": {{}}}}]',
        "",
        [("weather", CITY), ("time", "{}")],
    ),
    "mistral, newer": (
        "mistral",
        f"Well[TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]time[CALL_ID]ab12[ARGS]{{}}",
        "Well",
        [("weather", CITY), ("time", "{}")],
    ),
    "json": ("json", f'{{"name": "weather", "parameters": {CITY}}}', "", [("weather", CITY)]),
    "json, typed, several": (
        "json",
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {CITY}}}; '
        '{"name": "time", "parameters": {}}',
        "",
        [("weather", CITY), ("time", "{}")],
    ),
    "json, an answer": ("json", ADA, ADA, []),
    "json, an array": ("json", "[1, 2]", "[1, 2]", []),
    "json, text": ("json", "It is {warm}.", "It is {warm}.", []),
    "json, cut": ("json", '{"name": "weat', '{"name": "weat', []),
    "list": (
        "list",
        f'[{{"name": "weather", "parameters": {CITY}}},\n{{"name": "time", "parameters": {{}}}}]',
        "",
        [("weather", CITY), ("time", "{}")],
    ),
}


def calls_of(style: str, **settings) -> ToolCalls:
    return ToolCalls(Tools(NAMES, style, **settings), SimpleNamespace(special_tokens={}))


def gathered(parts: list[Part]) -> tuple[str, list[tuple[str, str]]]:
    text, calls = "", []
    for kind, piece in parts:
        if kind == "text":
            text += piece
        elif kind == "name":
            calls.append((piece, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + piece)
    return text, calls


@pytest.mark.parametrize("case", CASES)
def test_calls_are_found_however_the_text_is_cut(case: str) -> None:
    style, text, expected, calls = CASES[case]
    draw = random.Random(case)
    for n_cuts in (0, 1, 2, 5, len(text)):
        cuts = sorted(draw.sample(range(len(text)), n_cuts)) if n_cuts < len(text) else list(range(len(text)))
        reader = calls_of(style)
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
        assert gathered(parts) == (expected, calls), pieces
        assert reader.n_calls == len(calls)
        assert not reader.incomplete


def test_arguments_are_sent_while_they_come() -> None:
    reader = calls_of("hermes")
    assert reader.push('<tool_call>{"name": "weather", "arguments": {"city": "Zü') == [
        ("name", "weather"),
        ("arguments", '{"city": "Zü'),
    ]
    assert reader.push('rich"}') == [("arguments", 'rich"}')]
    assert reader.incomplete  # its own brace is missing
    assert reader.push("}") == []
    assert not reader.incomplete


def test_the_arguments_of_the_only_function_are_the_text() -> None:
    reader = calls_of("arguments", only="weather")
    parts = [part for char in f" {CITY}\n" for part in reader.push(char)] + reader.finish()
    assert gathered(parts) == ("", [("weather", CITY)])
    cut = calls_of("arguments", only="weather")
    assert gathered(cut.push('{"city": ') + cut.finish()) == ("", [("weather", '{"city": ')])
    assert cut.incomplete == '{"city": '


def test_without_parallel_calls_only_the_first_one_is_sent() -> None:
    reader = calls_of("hermes", parallel=False)
    assert gathered(reader.push(TWO) + reader.finish()) == ("Let me see.", [("weather", CITY)])


def test_the_marks_may_be_special_tokens() -> None:
    """These have no text: their ids tell."""
    tokenizer = SimpleNamespace(special_tokens={"[TOOL_CALLS]": 5, "[ARGS]": 6})
    reader = ToolCalls(Tools(NAMES, "mistral"), tokenizer)
    tokens = [("", 5), ("weather", 1), ("", 6), ('{"city": "x"}', 2)]
    parts = [part for token in tokens for part in reader.push(*token)]
    assert gathered(parts + reader.finish()) == ("", [("weather", '{"city": "x"}')])
