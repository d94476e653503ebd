"""The options for chat templates and special tokens, from the command line to the prompt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_mini import LLM, SamplingParams
from llama_mini.generate import main

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{{ tools }}{{ date_string }}"
    "{% if enable_thinking is defined and enable_thinking is false %}<|im_end|>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "tiny"
    shutil.copytree(tiny_dir, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float32", threads=1)


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ([], {}),
        (["enable_thinking=false", 'tools=[{"name": "f"}]'], {"enable_thinking": False, "tools": [{"name": "f"}]}),
        (["enable_thinking=False", "tools=None"], {"enable_thinking": False}),  # as Python writes them
        (["date_string=1 Jan 2020"], {"date_string": "1 Jan 2020"}),
        (["date_string=a=b"], {"date_string": "a=b"}),
        (["tools=null", "date_string="], {"date_string": ""}),
        (["chat_template={{ messages[0].content }}"], {"chat_template": "{{ messages[0].content }}"}),
    ],
)
def test_template_arguments_reach_the_template(
    checkpoint: Path, llm: LLM, capsys: pytest.CaptureFixture[str], options: list[str], variables: dict[str, Any]
) -> None:
    ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], **variables)
    expected = llm.generate(ids, SamplingParams(max_tokens=6))[0]
    given = [word for option in options for word in ("--template-arg", option)]
    assert main(["--model", str(checkpoint), "--dtype", "float32", "--max-tokens", "6", "--json", *given, "hi"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["token_ids"] == expected.token_ids
    assert said["stats"]["prompt_tokens"] == len(ids)


def test_special_tokens_are_read_in_a_raw_prompt(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", str(checkpoint), "--max-tokens", "1", "--json", "--raw", "<|im_start|>hi"]

    def prompt_tokens(*options: str) -> int:
        assert main([*args, *options]) == 0
        return json.loads(capsys.readouterr().out)["stats"]["prompt_tokens"]

    assert prompt_tokens("--special") == 1 + 1 + 2  # BOS, the special token, one for each letter
    assert prompt_tokens() == 1 + len("<|im_start|>") + 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--special", "hi"], "--special is for plain text: give --raw too"),
        (["--raw", "--template-arg", "x=1", "hi"], "--template-arg belongs to a chat"),
        (["--template-arg", "tools", "hi"], "--template-arg must be NAME=JSON, not 'tools'"),
        (["--template-arg", "=1", "hi"], "--template-arg must be NAME=JSON, not '=1'"),
        (["--template-arg", "messages=[]", "hi"], "--template-arg messages is not a variable of the template"),
        (["--template-arg", "enable_thinkin=true", "hi"], "did you mean 'enable_thinking'?"),
        (["--template-arg", "tools=x", "hi"], "tools is str 'x', expected a list"),
        (
            ["--template-arg", "tools=[]", "--template-arg", "tools=null", "hi"],
            "--template-arg: 'tools' is given twice",
        ),
        (["--template-arg", 'tools=[{"a": 1, "a": 2}]', "hi"], "the JSON: 'a' is given twice"),
        (["--logit-bias", "75=-inf", "--logit-bias", "75=5", "hi"], "--logit-bias: 75 is given twice"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["--model", str(checkpoint), *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
