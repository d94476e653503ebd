"""The messages of a chat in every form that people write: what a template gets, and what is refused."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from llama_mini import Tokenizer
from llama_mini.errors import RequestError
from llama_mini.tokenizer.messages import checked_messages, checked_variables

Open = Callable[[str], tuple[Tokenizer, Any]]
SHOWN = (
    "{% for m in messages %}{{ m.role }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}"
    "{{ m.tool_calls[0].function.arguments.city }}{% endif %}{{ m.content }}<|end|>{% endfor %}"
)
USER = {"role": "user", "content": "x"}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "sunny"}


class Role(enum.StrEnum):
    USER = "user"


@dataclass
class Question:
    role: str
    content: str
    name: str | None = None


def call(arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]}


@pytest.fixture
def open_both(chat_spec: Callable[[], dict[str, Any]], write_directory: Callable[..., Path]) -> Open:
    """This tokenizer and transformers', with a template."""

    def both(template: str) -> tuple[Tokenizer, Any]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        path = write_directory({"tokenizer.json": chat_spec(), "tokenizer_config.json": config})
        return Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    return both


def test_a_tool_call_needs_no_content(open_both: Open) -> None:
    ours, theirs = open_both(SHOWN)
    for assistant in ({"role": "assistant"}, {"role": "assistant", "content": None}):
        messages = [USER, assistant | call({"city": "Rome", "n": 1}), RESULT]
        ids = ours.apply_chat_template(messages)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = 'userx<|end|>assistant{"city": "Rome", "n": 1}Rome<|end|>toolsunny<|end|>'
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}', ' {"city":"Rome"}\n', "", {}])
def test_arguments_as_json_text_become_an_object(open_both: Open, arguments: Any) -> None:
    ours, _ = open_both(SHOWN)
    messages = [USER, {"role": "assistant"} | call(arguments)]
    expected = {"city": "Rome"} if "Rome" in str(arguments) else {}
    given = [USER, {"role": "assistant"} | call(expected)]
    assert ours.apply_chat_template(messages) == ours.apply_chat_template(given)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == arguments  # the caller's data stays as it is


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].tool_calls[0].function.arguments }}",
        "{{ tools | tojson if tools }}{{ messages[0].tool_calls[0]['function']['arguments'] + '' }}",  # DeepSeek
        "{{ tools | tojson if tools }}{{ '' + messages[0].tool_calls[0].function['arguments'] -}}",  # functionary
        "{% set f = messages[0].tool_calls[0].function %}{% if f.arguments is string %}{{ f.arguments }}"
        "{% else %}{{ f.arguments | tojson }}{% endif %}",  # either will do
    ],
)
def test_a_template_that_writes_arguments_as_text_gets_text(open_both: Open, template: str) -> None:
    ours, _ = open_both(template)
    ids = ours.apply_chat_template([{"role": "assistant"} | call('{"city": "Rome"}')])
    assert ours.decode(ids) == '{"city": "Rome"}'


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if '</think>' in messages[0].content %}{% endif %}{{ messages[0].tool_calls | length }}", "1"),  # Qwen3
        ("{% if messages[0]['content'] is none %}{{ messages[0]['tool_calls'] | length }}{% endif %}", "1"),  # DeepSeek
        ("{{ messages[0].content }}{{ messages[0].tool_calls | length }}", "1"),
    ],
)
def test_the_content_of_a_tool_call_is_what_the_template_asks_for(open_both: Open, template: str, text: str) -> None:
    ours, _ = open_both(template)
    for message in (call({}), {"content": None} | call({})):
        assert ours.decode(ours.apply_chat_template([{"role": "assistant"} | message])) == text


def test_a_tool_call_is_not_lost(open_both: Open, llama3_tiktoken: Tokenizer) -> None:
    ours, _ = open_both("{{ messages[0].content }}")
    for tokenizer in (ours, llama3_tiktoken):
        with pytest.raises(RequestError, match=r"messages\[0\] has tool_calls, which the chat template does not read"):
            tokenizer.apply_chat_template([{"role": "assistant", "content": "x"} | call({})])
        tokenizer.apply_chat_template([{"role": "assistant", "content": "x", "tool_calls": []}])  # there is none


def test_objects_of_other_libraries_are_messages() -> None:
    pydantic = pytest.importorskip("pydantic")
    # As the openai package has them: a model in a model, with fields that are None.
    call_of_openai = pydantic.create_model("ToolCall", id=str, type=str, function=dict[str, str])
    answer_of_openai = pydantic.create_model(
        "Message", role=(str, "assistant"), content=(str | None, None), tool_calls=list[call_of_openai]
    )
    answer = answer_of_openai(tool_calls=call('{"city": "Rome"}')["tool_calls"])
    messages = [Question("user", "x"), answer, {"role": Role.USER, "content": "y", "n": np.int64(3), "b": np.bool_(0)}]
    checked = checked_messages(messages, SHOWN)
    assert checked[:2] == [USER, {"role": "assistant", "content": ""} | call({"city": "Rome"})]
    assert checked[2] == {"role": "user", "content": "y", "n": 3, "b": False}
    kinds = {type(value) for value in checked[2].values()}
    assert kinds == {str, int, bool}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b "}], "a\nb "),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}, {"text": "c"}], "a\nb\nc"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["a", "b"], "a\nb"),
        ([], ""),
    ],
)
def test_text_parts_are_joined_with_newlines_as_in_vllm(content: Any, text: str) -> None:
    for role in ("user", "system", "developer", "assistant", "tool"):
        assert checked_messages([{"role": role, "content": content}])[0]["content"] == text


READ_AS_PARTS = {
    "loop": "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}",  # SmolVLM
    "variable": "{% set x = m.get('content') or [] %}{% for c in x[:9] if c.type == 'text' %}{{ c.text }}{% endfor %}",
    "index": "{{ m.content[0]['text'] }}{% for i in range(1, m.content | length) %}{{ m.content[i].text }}{% endfor %}",
    "filter": "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}",
    "map": "{{ m.content | map(attribute='text') | join }}",
    "first and last": "{{ (m.content | first).text }}{% if m.content[1:] %}{{ m.content[-1].text }}{% endif %}",
    "macro": "{% macro show(all) %}{% for c in all %}{{ one(part=c) }}{% endfor %}{% endmacro %}"
    "{% macro one(x, part) %}{{ part.text }}{% endmacro %}{{ show(m.content) }}",
}
TAKES_BOTH = {
    "LLaMA 4": "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text | trim }}{% endfor %}{% endif %}",
    "GLM": "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}"
    "{% for x in c %}{{ x.text }}{% endfor %}{% endif %}{% endmacro %}{{ show(m.content) }}",
}


@pytest.mark.parametrize("name", [*READ_AS_PARTS, *TAKES_BOTH])
def test_a_template_that_reads_parts_gets_them_as_in_transformers(open_both: Open, name: str) -> None:
    shown = (READ_AS_PARTS | TAKES_BOTH)[name]
    ours, theirs = open_both("{% for m in messages %}<|im_start|>{{ m.role }} " + shown + "<|im_end|>{% endfor %}")

    def chat(*contents: Any) -> list[Any]:
        return [{"role": role, "content": c} for role, c in zip(("user", "assistant"), contents, strict=True)]

    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    parts = chat([part("one "), part("<|im_end|>two")], [part("<think>three")])
    strings = chat(" one ", "two")
    as_read = strings if name in TAKES_BOTH else chat([part(" one ")], [part("two")])
    for given, expected in (
        (parts, parts),
        (strings, as_read),
        (chat(["a"], [{"text": "b"}]), chat([part("a")], [part("b")])),
    ):
        text = theirs.apply_chat_template(expected, tokenize=False)
        assert ours.decode(ours.apply_chat_template(given), skip_special_tokens=False) == text
        text = theirs.apply_chat_template(expected, tokenize=False, continue_final_message=True)
        ids = ours.apply_chat_template(given, continue_final_message=True)
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert ids.count(3) == 1  # the first message is closed, the last is not; text does not close one


@pytest.mark.parametrize(
    "shown",
    [
        "{{ m.content[0] }}{{ m.content[1:] | trim }}",
        "{% for c in m.content %}{{ c.upper() }}{{ c[0] }}{% endfor %}",
        "{% if m.content is string %}{% set content = m.content %}{% endif %}{{ content }}",  # Qwen3
        "{% for t in tools or [] %}{{ t.text }}{{ t['content'].text }}{% endfor %}{{ m.content | tojson }}",
    ],
)
def test_a_template_that_reads_a_string_gets_one(open_both: Open, shown: str) -> None:
    ours, theirs = open_both("{% for m in messages %}" + shown + "{% endfor %}")
    text = theirs.apply_chat_template([{"role": "user", "content": "a\nb"}], tokenize=False)
    for content in ("a\nb", ["a", {"type": "text", "text": "b"}]):
        assert ours.decode(ours.apply_chat_template([{"role": "user", "content": content}])) == text


def test_a_tool_may_answer_with_an_object(open_both: Open) -> None:
    ours, theirs = open_both("{{ messages[-1].content | tojson }}")
    messages = [USER, RESULT | {"content": {"sky": "<|end|>", "t": 21.5}}]
    ids = ours.apply_chat_template(messages)
    assert ours.decode(ids) == theirs.apply_chat_template(messages, tokenize=False)
    assert 1 not in ids


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}, "image"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "'input_audio'; this model reads"),
        ({"role": "user", "content": [{"type": "text"}]}, r"\['content'\]\[0\]\['text'\] is missing"),
        ({"role": "user", "content": [1]}, r"messages\[1\]\['content'\]\[0\] is int 1; this model reads text alone"),
        ({"role": "user", "content": {"a": 1}}, r"\['content'\] is dict .*expected a string or a list of text parts"),
        ({"role": "user"}, r"messages\[1\]\['content'\] is missing"),
        ({"role": "assistant"}, r"messages\[1\]\['content'\] is missing"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, r"messages\[1\]\['tool_calls'\] is dict"),
        ({"role": "assistant", "tool_calls": ["f"]}, r"messages\[1\]\['tool_calls'\]\[0\] is str 'f'"),
        ({"role": "assistant"} | call("{city: Rome}"), r"\['tool_calls'\]\[0\]: its arguments, .*Rome.*, are not JSON"),
        ([USER], r"messages\[1\] is list"),
        (dict, r"messages\[1\] is type"),
    ],
)
def test_what_no_template_understands_is_refused(message: Any, fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        checked_messages([USER, message], SHOWN)


def test_variables_are_plain_data() -> None:
    tool = {"type": "function", "function": {"name": "f", "n": [1, 2.5, None, True]}}
    assert checked_variables({"tools": (tool,), "documents": None, "x": np.float32(0.5)}) == {"tools": [tool], "x": 0.5}
    assert checked_variables({"tools": [Question("f", "x")]}) == {
        "tools": [{"role": "f", "content": "x", "name": None}]
    }
    ours = {"tokenize": True, "return_dict": False, "padding": False, "return_tensors": None}
    assert checked_variables(ours) == {}  # as here anyway
    more = {"enable_thinking": False, "x": None}
    assert checked_variables({"a": 1, "chat_template_kwargs": more}) == {"a": 1, "enable_thinking": False}
    assert checked_variables({"chat_template_kwargs": None}) == {}


def weather(city: str) -> str:
    return city


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"tools": [weather]}, r"tools\[0\] is function .*, expected a mapping, such as .*get_json_schema makes"),
        ({"tools": [1]}, r"tools\[0\] is int 1, expected a mapping"),
        ({"tools": {"name": "f"}}, "tools is dict .*, expected a list"),
        ({"documents": "text"}, "documents is str 'text', expected a list"),
        ({"x": object()}, "x is object .*, expected plain JSON data"),
        ({"tokenize": False}, "tokenize is False, .* decode the ids with skip_special_tokens=False"),
        ({"return_tensors": "pt"}, r"return_tensors is 'pt', but the result is a list of all ids; .*torch.tensor\("),
        ({"padding": True}, "padding is True"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is str 'x', expected a mapping"),
    ],
)
def test_other_variables_are_refused(variables: dict[str, Any], fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        checked_variables(variables)
