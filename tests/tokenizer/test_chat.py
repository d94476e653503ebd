"""Chats: the ids of transformers for clean messages, and no control token out of a message."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llama_mini.errors import RequestError, TokenizerError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.sandbox import render

Write = Callable[[dict[str, Any]], Path]
Spec = dict[str, Any]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "bos": "{{ bos_token }}" + CHATML,
    "trimmed": """
        {{- bos_token }}
        {%- for m in messages %}
            {{- '<|im_start|>' + m.role + '<|im_end|>\n\n' + m['content'] | trim + '<|end|>' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}
    """,
    "blocks": """
    {% if messages[0].role == "system" %}
    {% set system = messages[0].content %}
    {% set rest = messages[1:] %}
    {% else %}
    {% set rest = messages %}
    {% endif %}
    {% for m in rest %}
    {% if loop.index0 > 8 %}{% break %}{% endif %}
    {% if not m.content %}{% continue %}{% endif %}
    [{{ m.role }}] {{ m.content }}{% generation %}{{ eos_token }}{% endgeneration %}

    {% endfor %}
    {{ system }}
    """,
    "reasoning": """
        {%- set ns = namespace(seen=false, kinds=dict(a=1)) %}
        {%- for m in messages %}
            {%- set content = m.content %}
            {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
            {%- if m.reasoning_content %}{{ '<think>' + m.thinking + '</think>' }}{% set ns.seen = true %}{% endif %}
            {{- '<|im_start|>' ~ m.role ~ '\n' ~ content ~ '<|im_end|>' ~ ns.seen ~ ns.kinds }}
        {%- endfor %}{{- '<|im_start|>assistant\n<think>\n' }}
    """,
    "tools": """
        {%- if tools %}tools{% endif %}{% if documents is not none %}documents{% endif %}
        {%- for m in messages %}{{- m | tojson }}{{- m.extra | default({}) | tojson(indent=2) }}<|end|>{% endfor %}
        {{- strftime_now('%Y') }}{{ missing }}{{ pad_token }}
    """,
}
CHATS = {
    "one": [{"role": "user", "content": "Why is the sky blue?"}],
    "turns": [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "天空 🎉  <b>&amp;</b>\r\n"},
        {"role": "assistant", "content": "", "name": None},
        {"role": "user", "content": "and  now?", "extra": {"é": [1, 2.5, True, None, {"x": "y'\""}]}},
    ],
    "thoughts": [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4", "reasoning": "hm"},
        {"role": "user", "content": "sure?"},
    ],
}
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
    "pad_token": "<|end|>",
}


def with_bos(spec: Spec) -> Spec:
    """The same, with a post-processor that puts <|begin|> in front."""
    begin = {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}}
    single = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return spec | {
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": begin}
    }


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_ids_are_those_of_transformers(
    chat_spec: Callable[[], Spec], write_directory: Write, template: str, chat: list[dict[str, Any]]
) -> None:
    path = write_directory(
        {"tokenizer.json": chat_spec(), "tokenizer_config.json": CONFIG, "chat_template.jinja": template}
    )
    ours, theirs = Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        ids = ours.apply_chat_template(chat, add_generation_prompt=prompt)
        assert ids == expected  # also of <think>, which is a word of the vocabulary, in the assistant's turn
        assert ours.decode(ids, False) == theirs.decode(expected)


def test_a_real_llama_3_tokenizer_with_its_template(
    llama3_files: Any, llama3_tiktoken: Tokenizer, write_directory: Write
) -> None:
    template = (  # the chat template of Meta-Llama-3-8B-Instruct
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
        "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "chat_template": template}
    path = write_directory({"tokenizer.json": llama3_files.json.read_bytes(), "tokenizer_config.json": config})
    ours, theirs = Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for chat in (CHATS["one"], [{"role": "system", "content": "Be brief. 日本"}, *CHATS["one"]]):
        ids = ours.apply_chat_template(chat)
        assert ids == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == llama3_tiktoken.apply_chat_template(chat)


def test_a_meta_directory_gets_the_llama_3_dialogue(
    llama3_tiktoken: Tokenizer, small_tiktoken: bytes, write_directory: Write
) -> None:
    tokenizer = llama3_tiktoken
    assert tokenizer.has_chat_template
    # Ids of the prompt format in Meta's model card: header ids, "\n\n" is 271; contents are not stripped.
    chat = [{"role": "user", "content": " hi\n"}, {"role": "tool", "content": "1"}]
    text = tokenizer.encode(" hi\n", add_special_tokens=False)
    tool = tokenizer.encode("ipython", add_special_tokens=False)
    expected = [128000, 128006, 882, 128007, 271, *text, 128009, 128006, *tool, 128007, 271, 16, 128009]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=False) == expected
    assert tokenizer.apply_chat_template(chat) == [*expected, 128006, 78191, 128007, 271]
    path = write_directory({"tokenizer.model": small_tiktoken, "tokenizer_config.json": {}})
    assert not Tokenizer.from_pretrained(path).has_chat_template


def test_bos_stands_in_front_exactly_once(
    chat_spec: Callable[[], Spec], train_sentencepiece: Callable[..., bytes], write_directory: Write
) -> None:
    path = write_directory({"tokenizer.json": with_bos(chat_spec()), "tokenizer_config.json": CONFIG})
    for template in (TEMPLATES["chatml"], TEMPLATES["bos"]):
        write_directory({"chat_template.jinja": template})
        ids = Tokenizer.from_pretrained(path).apply_chat_template(CHATS["one"])
        assert ids[:2] == [0, 2]
        assert ids.count(0) == 1
    write_directory({"tokenizer.json": chat_spec(), "chat_template.jinja": TEMPLATES["chatml"]})
    assert 0 not in Tokenizer.from_pretrained(path).apply_chat_template(CHATS["one"])  # its rule adds none
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    write_directory(
        {"tokenizer.model": train_sentencepiece(), "chat_template.jinja": "{{ bos_token }}[{{ messages }}]"}
    )
    ids = Tokenizer.from_pretrained(path).apply_chat_template(CHATS["one"])
    assert ids[0] == 1
    assert ids.count(1) == 1


def test_no_template_says_to_use_raw_completion(chat_spec: Callable[[], Spec], write_directory: Write) -> None:
    tokenizer = Tokenizer.from_pretrained(write_directory({"tokenizer.json": chat_spec()}))
    assert not tokenizer.has_chat_template
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match=r"no chat template; complete raw text instead \(--raw\)"):
        tokenizer.apply_chat_template(CHATS["one"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is list"),
        ("hi", "messages is str 'hi'"),
        (None, "messages is missing"),
        ({"role": "user", "content": "x"}, "messages is dict"),
        (["hi"], r"messages\[0\] is str 'hi', expected a mapping"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] is missing, expected a string"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] is missing"),
        ([{"role": 1, "content": "x"}], r"\['role'\] is int 1"),
        ([{"role": "user", "content": "x", "extra": {"a": [object()]}}], r"\['extra'\]\['a'\]\[0\] is object"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "expected plain JSON data"),
        ([{"role": "user", "content": "a\ud800"}], "half a surrogate pair"),
        ([{"role": "user", "content": "x", "n": 10**5000}], "cannot be written as JSON .*4300 digits"),
        ([{"role": "user", "content": "x", "k" * 10**6: object()}], r"'kkk.{0,300}, expected plain JSON data$"),
    ],
)
def test_malformed_messages_are_request_errors(
    chat_spec: Callable[[], Spec], write_directory: Write, messages: Any, message: str
) -> None:
    path = write_directory({"tokenizer.json": chat_spec(), "chat_template.jinja": CHATML})
    with pytest.raises(RequestError, match=message):
        Tokenizer.from_pretrained(path).apply_chat_template(messages)


def test_nested_messages_work_or_are_refused(chat_spec: Callable[[], Spec], write_directory: Write) -> None:
    path = write_directory({"tokenizer.json": chat_spec(), "chat_template.jinja": "{{ messages[0].content }}"})
    tokenizer = Tokenizer.from_pretrained(path)
    outcomes = []
    for depth in range(5, 1100, 40):
        deep: list[Any] = []
        for _ in range(depth):
            deep = [deep]
        try:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi", "extra": deep}])
            outcomes.append(tokenizer.decode(ids))
        except RequestError:
            outcomes.append("refused")
    assert outcomes[0] == "hi"
    assert outcomes[-1] == "refused"
    assert set(outcomes) == {"hi", "refused"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ missing.attribute }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "SecurityError"),
        ("{{ dict.__subclasses__() }}", "no attribute"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_a_failing_template_is_a_tokenizer_error(template: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=f"the chat template failed: .*{message}"):
        render(template, {"messages": [{"role": "user", "content": "x"}]})


def test_a_template_is_rendered_with_the_date_of_today() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}", {}) == datetime.now().strftime("%d %b %Y")


def test_a_template_works_on_a_tiktoken_file(small_tiktoken: bytes, write_directory: Write) -> None:
    path = write_directory(
        {"tokenizer.model": small_tiktoken, "chat_template.jinja": "{{ bos_token }}{{ messages[0].content }}"}
    )
    content = "<|eot_id|>"
    assert Tokenizer.from_pretrained(path).apply_chat_template([{"role": "user", "content": content}]) == [
        256,
        *content.encode(),
    ]
