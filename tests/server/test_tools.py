"""Tools in chats: calls that a model makes by itself, and calls that it must make."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_mini import LLM
from tests.server.local import Client, writing

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"day": {"enum": ["Mo", "Tu"]}, "place": {"$ref": "#/$defs/Place"}},
    "required": ["day", "place"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "string", "maxLength": 3}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m['role'] + ': ' }}"
    "{{ m['content'] or '' }}{% for call in m['tool_calls'] %}<tool_call>{{ call['function'] | tojson }}</tool_call>"
    "{% endfor %}\n{% endfor %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"day": "Mo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def llm(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Tiny, with a template that shows tools as Qwen's does."""
    copy = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("tools") / "tiny")
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return LLM(copy, dtype="float32", kernels="off", threads=1)


def joined(events: list[Any]) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Text, calls and finish reasons of a stream."""
    text, calls, reasons = "", list[dict[str, Any]](), []
    for event in events:
        (choice,) = event["choices"]
        text += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", []):
            if call["index"] == len(calls):
                calls.append(call)
            else:
                assert "id" not in call
                assert "name" not in call["function"]
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, calls, reasons


def functions(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    assert all(call["type"] == "function" and call["id"] for call in calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_a_model_calls_by_itself(llm: LLM, client: Client) -> None:
    with writing(llm, f"I look.\n{CALL}\n{CALL}"):
        (choice,) = client.post(CHAT, messages=MESSAGES, tools=TOOLS, temperature=0)["choices"]
    assert choice["message"]["content"] == "I look."
    assert functions(choice["message"]["tool_calls"]) == [("weather", {"day": "Mo"})] * 2
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    assert choice["finish_reason"] == "tool_calls"
    with writing(llm, f"I look.\n{CALL}\n{CALL}"):
        text, calls, reasons = joined(client.events(CHAT, messages=MESSAGES, tools=TOOLS, temperature=0))
    assert (text, functions(calls), reasons) == ("I look.", [("weather", {"day": "Mo"})] * 2, ["tool_calls"])
    with writing(llm, f"{CALL}\n{CALL}"):
        only = client.post(CHAT, messages=MESSAGES, tools=TOOLS, temperature=0, parallel_tool_calls=False)
    assert len(only["choices"][0]["message"]["tool_calls"]) == 1
    assert only["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize(
    ("text", "settings"),
    [("No calls here.", {}), (CALL, {"tool_choice": "none"}), ("<tool_call>{broken</tool_call>", {})],
)
def test_what_is_no_call_is_text(llm: LLM, client: Client, text: str, settings: dict[str, Any]) -> None:
    with writing(llm, text):
        (choice,) = client.post(CHAT, messages=MESSAGES, tools=TOOLS, temperature=0, **settings)["choices"]
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_is_text(llm: LLM, client: Client) -> None:
    """A client must not run it. A stream has sent the beginning by then; its finish reason tells."""
    cut = CALL[: CALL.index("Mo")]
    with writing(llm, CALL):  # of which the last token completes the call
        (choice,) = client.post(CHAT, messages=MESSAGES, tools=TOOLS, temperature=0, max_tokens=len(CALL))["choices"]
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("tool_calls", 1)
    with writing(llm, CALL):
        (choice,) = client.post(CHAT, messages=MESSAGES, tools=TOOLS, temperature=0, max_tokens=len(cut))["choices"]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)
    assert cut.endswith(choice["message"]["content"])
    with writing(llm, CALL):
        events = client.events(CHAT, messages=MESSAGES, tools=TOOLS, temperature=0, max_tokens=len(cut))
    text, (call,), reasons = joined(events)
    assert (text, call["function"]["arguments"], reasons) == ("", '{"day": "', ["length"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_model_must_call(client: Client, choice: Any, stream: bool) -> None:
    """A random model would never: its text is made to match the schema of the arguments."""
    settings = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": 3, "parallel_tool_calls": False}
    if stream:
        text, calls, reasons = joined(client.events(CHAT, **settings))
        assert (text, reasons) == ("", ["tool_calls"])
    else:
        (answer,) = client.post(CHAT, **settings)["choices"]
        calls = answer["message"]["tool_calls"]
        assert (answer["message"]["content"], answer["finish_reason"]) == (None, "tool_calls")
    ((name, arguments),) = functions(calls)
    if choice == NAMED or name == "weather":
        assert (name, arguments["day"] in ("Mo", "Tu"), len(arguments["place"]) <= 3) == ("weather", True, True)
    else:
        assert (name, type(arguments)) == ("time", dict)


def test_one_token_is_no_call(client: Client) -> None:
    settings = {"messages": MESSAGES, "tools": TOOLS, "max_completion_tokens": 1}
    for choice in ("required", NAMED):
        (answer,) = client.post(CHAT, tool_choice=choice, **settings)["choices"]
        assert (answer["finish_reason"], "tool_calls" in answer["message"]) == ("length", False)


def test_calls_and_their_results_are_shown_to_the_model(client: Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"day": "Mo"}'}}
    chat = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat.append({"role": "tool", "tool_call_id": "call_1", "content": "sunny"})
    ids = client.post("/tokenize", messages=chat, tools=TOOLS)["tokens"]
    text = client.post("/detokenize", tokens=ids)["prompt"]
    assert '<tool_call>{"name": "weather", "arguments": {"day": "Mo"}}</tool_call>' in text
    assert "tool: sunny" in text
    assert '"description": "Tells it."' in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": NAMED}, "there are no tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "'x'; the tools are weather",
        ),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice must be one of none, auto, required or"),
        ({"tools": TOOLS, "tool_choice": "any"}, "unknown tool_choice 'any'; known: none, auto, required"),
        ({"tools": [{"type": "custom"}]}, r"tools\[0\] must be"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "'weather' is given twice"),
        ({"tools": "f"}, "tools must be a list"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "do not go with a format"),
        ({"functions": []}, "functions cannot be .*: give tools"),
    ],
)
def test_wrong_tools_are_refused(client: Client, body: dict[str, Any], message: str) -> None:
    error = client.refused(CHAT, messages=MESSAGES, **body)
    assert re.search(message, error["message"]), error


def test_tools_are_refused_where_the_template_does_not_know_them(tiny_dir: Path) -> None:
    with Client(LLM(tiny_dir, dtype="float32", kernels="off", threads=1)) as client:
        for choice in ("auto", "required", NAMED):
            error = client.refused(CHAT, messages=MESSAGES, tools=TOOLS, tool_choice=choice)
            assert "the chat template does not read 'tools'" in error["message"]
