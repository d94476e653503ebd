"""Which template renders a chat, and what else than messages it gets: as in transformers, but nothing is ignored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llama_mini import Tokenizer
from llama_mini.errors import RequestError, TokenizerError
from llama_mini.tokenizer.sandbox import read_by

Open = Callable[..., tuple[Tokenizer, Any]]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello <think> \n"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"a": [1, None, 2.5, True]}}}
TEMPLATE = """
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- set kept = namespace(last=none) %}{{ bos_token }}{{ date_string }}
{%- if tools %}{{ tools | tojson(indent=1) }}{% endif %}
{%- for document in documents or [] %}{{ document.title }}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% set kept.last = loop.index %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>{% endif %}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{{ strftime_now("%Y")[:0] }}
"""
VARIABLES = {"date_string", "custom_tools", "tools", "documents", "enable_thinking", "bos_token"}


@pytest.fixture
def open_both(chat_spec: Callable[[], dict[str, Any]], write_directory: Callable[..., Path]) -> Open:
    """This tokenizer and transformers', with a template or several."""

    def both(template: Any) -> tuple[Tokenizer, Any]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "chat_template": template}
        path = write_directory({"tokenizer.json": chat_spec(), "tokenizer_config.json": config})
        return Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    return both


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"tools": [TOOL], "documents": [{"title": "T", "text": "t"}]},
        {"tools": None, "documents": None},
        {"enable_thinking": False},
        {"enable_thinking": True, "date_string": "1 Jan 2020"},
        {"custom_tools": [{"name": "g"}], "bos_token": "B"},
    ],
)
def test_variables_reach_the_template_as_in_transformers(open_both: Open, variables: dict[str, Any]) -> None:
    ours, theirs = open_both(TEMPLATE)
    for prompt in (True, False):
        ids = ours.apply_chat_template(CHAT, prompt, **variables)
        assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False, **variables)


def test_the_variables_are_those_that_the_template_reads(open_both: Open) -> None:
    ours, _ = open_both(TEMPLATE)
    assert ours.template_variables == VARIABLES
    assert read_by("{% macro f(a) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{{ range(n) }}")[0] == ["b", "n"]
    with pytest.raises(TokenizerError, match="the chat template failed: TemplateSyntaxError"):
        read_by("{% for %}")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("enable_thinkin", "did you mean 'enable_thinking'?"),
        ("data_string", "did you mean 'date_string'?"),
        ("zzz", "it reads custom_tools, date_string, documents, enable_thinking, tools"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(open_both: Open, name: str, hint: str) -> None:
    ours, _ = open_both(TEMPLATE)
    with pytest.raises(RequestError) as refused:
        ours.apply_chat_template(CHAT, **{name: 1})
    assert str(refused.value) == f"the chat template does not read {name!r}; {hint}"
    ours, _ = open_both("{{ messages[0].content }}{{ eos_token }}")
    ours.apply_chat_template(CHAT, **{name: None})  # not given
    with pytest.raises(RequestError, match="does not read 'tools'; it reads no variables"):
        ours.apply_chat_template(CHAT, tools=[TOOL])


def test_metas_dialogue_reads_no_variables(llama3_tiktoken: Tokenizer) -> None:
    assert llama3_tiktoken.template_variables == {"bos_token"}
    with pytest.raises(RequestError, match="does not read 'tools'"):
        llama3_tiktoken.apply_chat_template(CHAT, tools=[TOOL])
    with pytest.raises(TokenizerError, match="the chat template failed: TypeError"):
        llama3_tiktoken.apply_chat_template([{"role": "tool", "content": {"sky": "blue"}}])
    whole = llama3_tiktoken.apply_chat_template(CHAT, False)
    assert llama3_tiktoken.apply_chat_template(CHAT, continue_final_message=True) == whole[:-1]


@pytest.mark.parametrize("content", ["Hello", " Hello \n", "<think>\nso</think> a ", "é <|im_end|> b", ""])
@pytest.mark.parametrize("shown", ["m.content", "m.content | trim", "m.content | tojson(ensure_ascii=true)"])
def test_the_last_message_is_continued_as_in_transformers(open_both: Open, content: str, shown: str) -> None:
    ours, theirs = open_both("{% for m in messages %}<|im_start|>{{ " + shown + " }}<|im_end|>\n{% endfor %}")
    chat = [CHAT[0], {"role": "assistant", "content": content}]
    expected, failed = "", None
    try:
        expected = theirs.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    except ValueError as error:
        failed = error
    if failed:
        with pytest.raises(RequestError, match="does not show the last message whole"):
            ours.apply_chat_template(chat, continue_final_message=True)
        return
    ids = ours.apply_chat_template(chat, continue_final_message=True)
    assert ours.decode(ids, skip_special_tokens=False) == expected
    assert ids.count(3) == 1  # the first message is closed, the last is not


def test_what_cannot_be_continued_is_refused(open_both: Open) -> None:
    ours, _ = open_both("{{ messages[0].content }}{% if messages[-1].tool_calls %}{% endif %}")
    with pytest.raises(RequestError, match="does not show the last message whole"):
        ours.apply_chat_template(CHAT, continue_final_message=True)
    with pytest.raises(RequestError, match="has no text that continue_final_message could continue"):
        ours.apply_chat_template([CHAT[0], {"role": "tool", "content": {"a": 1}}], continue_final_message=True)
    with pytest.raises(RequestError, match="continue_final_message must be true or false, not 'content'"):
        ours.apply_chat_template(CHAT, continue_final_message="content")  # type: ignore[arg-type]


def test_tools_choose_the_template_for_tools(open_both: Open) -> None:
    texts = {"default": "d{{ messages[0].content }}", "tool_use": "t{{ tools[0].x }}", "rag": "r{{ documents[0].x }}"}
    ours, theirs = open_both([{"name": name, "template": text} for name, text in texts.items()])
    for variables in ({}, {"tools": [{"x": "X"}]}, {"chat_template": "rag", "documents": [{"x": "X"}]}):
        ids = ours.apply_chat_template(CHAT, **variables)
        assert ids == theirs.apply_chat_template(CHAT, return_dict=False, **variables)
    assert ours.template_variables == {"tools"}
    assert ours.decode(ours.apply_chat_template(CHAT, chat_template="own {{ x }}", x=[1])) == "own [1]"
    with pytest.raises(RequestError, match=r"chat_template is 'rga', .* one in this checkpoint: 'default', 'tool_use'"):
        ours.apply_chat_template(CHAT, chat_template="rga")
    ours, _ = open_both([{"name": "rag", "template": texts["rag"]}])
    assert not ours.has_chat_template
    with pytest.raises(TokenizerError, match="is the default: name one of 'rag'"):
        ours.apply_chat_template(CHAT)
