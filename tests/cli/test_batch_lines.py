"""The lines of a batch: how they are read, and the forms in which a request may be written."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_mini.cli import batch_lines
from llama_mini.cli.batch import Batch
from llama_mini.cli.batch_lines import Asked, Line, asked, parse, read_lines
from llama_mini.cli.options import parser
from llama_mini.engine.request import Completion, Stats
from llama_mini.engine.sampling_params import SamplingParams, sampling_params
from llama_mini.errors import RequestError
from llama_mini.generate import main
from llama_mini.tokenizer import Tokenizer
from tests.cli.test_batch import command, results

CHAT = [{"role": "user", "content": "hi"}]


def lines(data: bytes) -> list[Line]:
    return list(read_lines(io.BytesIO(data), "prompts"))


def request(**fields: Any) -> Asked:
    return asked(parse(lines(json.dumps(fields).encode())[0])[1])


def openai(body: dict[str, Any], url: str | None = "/v1/chat/completions", **more: Any) -> Asked:
    return request(custom_id="a", method="POST", url=url, body=body, **more)


def test_marks_and_line_ends_are_no_text() -> None:
    plain = lines(b'{"prompt": "a"}\n\n{"prompt": "b"}')
    marked = lines(b'\xef\xbb\xbf{"prompt": "a"}\r\n \r\n{"prompt": "b"}\r\n')
    assert [(line.index, line.digest) for line in marked] == [(line.index, line.digest) for line in plain]
    assert [parse(line)[1] for line in marked] == [{"prompt": "a"}, {"prompt": "b"}]
    assert [line.index for line in plain] == [0, 2]
    with pytest.raises(RequestError, match="prompts is UTF-16 or UTF-32 text: save it as UTF-8"):
        lines('{"prompt": "a"}'.encode("utf-16"))


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_too_long_is_skipped(monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE", 40)
    longest, longer = b'{"prompt": "%s"}' % (b"x" * 26), b'{"prompt": "%s"}' % (b"x" * 200)
    first, second, *third = lines(longest + b"\n" + longer + end + (longest if end else b""))
    assert parse(first)[1] == {"prompt": "x" * 26}
    with pytest.raises(RequestError, match=f"the line has {214 + len(end)} bytes; at most 40 are read"):
        parse(second)
    assert len(second.data) <= 41
    assert [(line.index, parse(line)[1]) for line in third] == ([(2, {"prompt": "x" * 26})] if end else [])
    assert second.digest != lines(longer[:-3] + b'y"}' + end)[0].digest


def test_openai_fields_are_ours() -> None:
    body = {"model": "gpt", "messages": CHAT, "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    body |= {"stop": ["x"], "n": 1, "logprobs": True, "top_logprobs": 2, "presence_penalty": 1, "user": "u"}
    body |= {"frequency_penalty": 1, "logit_bias": {"7": -100}, "metadata": {}, "stream": False, "tools": [{"a": 1}]}
    found = openai(body)
    assert (found.prompt, found.is_chat, found.variables) == (CHAT, True, {"tools": [{"a": 1}]})
    expected = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "top_logprobs": 2}
    expected |= {"presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {7: -100}}
    assert sampling_params(**found.settings) == SamplingParams(**expected)
    found = openai({"prompt": "hi", "max_tokens": 5, "logprobs": 2}, "/v1/completions")
    assert (found.prompt, found.is_chat) == ("hi", False)
    assert sampling_params(**found.settings) == SamplingParams(max_tokens=5, top_logprobs=2)
    assert openai({"messages": CHAT}, None).settings == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampling_params(**openai({"messages": CHAT, "echo": True}).settings), "unknown setting 'echo'"),
        (lambda: openai({"messages": CHAT}, "/v1/embeddings"), "unknown url '/v1/embeddings'; known: /v1/chat/comp"),
        (lambda: openai({"prompt": "a"}), "the body of a request to /v1/chat/completions must have 'messages'"),
        (lambda: openai({"messages": CHAT}, prompt="a"), "unknown 'prompt' beside \"body\""),
        (lambda: request(body=[1]), r"body must be an object, not \[1\]"),
        (lambda: request(method="GET", body={"messages": CHAT}), "unknown method 'GET'; known: POST"),
    ],
)
def test_other_fields_are_named(make: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


def test_null_is_not_given() -> None:
    nothing = dict.fromkeys(
        [*(f.name for f in fields(SamplingParams)), "id", "custom_id", "tools", "chat_template_kwargs", "n", "body"]
    )
    assert request(**nothing, prompt="a", messages=None) == Asked("a", None, {}, {})
    assert openai(nothing | {"messages": CHAT, "prompt": None, "logprobs": None}) == Asked(CHAT, True, {}, {})


def test_a_result_has_the_names_of_its_line(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    right = {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": CHAT, "max_tokens": 2}}
    path.write_text("\n".join(map(json.dumps, [right, {"custom_id": "b", "id": 5, "body": 1}])))
    assert main([word for word in command(tiny_dir, path) if word != "--raw"]) == 0
    first, second = results(Path(f"{path}.results.jsonl"))
    assert (first["custom_id"], len(first["token_ids"]), first["error"]) == ("a", 2, None)
    assert (second["custom_id"], second["id"], second["error"]) == ("b", 5, "body must be an object, not 1")


def test_variables_reach_the_chat_template(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def template(self: Tokenizer, messages: Any, **variables: Any) -> list[int]:
        given.append(variables)
        return [5]

    monkeypatch.setattr(Tokenizer, "apply_chat_template", template)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "tools": [1], "chat_template_kwargs": {"enable_thinking": False}}))
    assert main(["--model", str(tiny_dir), "--kernels", "off", "--max-tokens", "2", "--batch", str(path)]) == 0
    assert given == [{"tools": [1], "enable_thinking": False}]


def test_the_system_message_of_the_command_is_the_default(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    own = [{"role": "system", "content": "Be long."}, *CHAT]
    asked = [{"prompt": "hi"}, {"messages": CHAT}, {"messages": own}, {"messages": "hi"}]
    path.write_text("\n".join(map(json.dumps, asked)))
    args = ["--model", str(tiny_dir), "--kernels", "off", "--max-tokens", "2", "--system", "Be brief."]
    assert main([*args, "--batch", str(path)]) == 0
    found = results(Path(f"{path}.results.jsonl"))
    template = Tokenizer.from_pretrained(tiny_dir).apply_chat_template
    brief = len(template([{"role": "system", "content": "Be brief."}, *CHAT]))
    lengths = [result["stats"]["prompt_tokens"] for result in found[:3]]
    assert lengths == [brief, brief, len(template(own))]
    assert "messages" in found[3]["error"]


def prompt_tokens(tiny_dir: Path, path: Path, lines: list[dict[str, Any]], *options: str) -> list[Any]:
    """The number of prompt tokens of each line, or its error."""
    path.write_text("\n".join(map(json.dumps, lines)))
    args = ["--model", str(tiny_dir), "--kernels", "off", "--max-tokens", "2", "--output", f"{path}.{len(options)}"]
    assert main([*args, *options, "--batch", str(path)]) == 0
    found = results(Path(f"{path}.{len(options)}"))
    return [each["error"] or each["stats"]["prompt_tokens"] for each in found]


def test_completions_are_plain_text_in_any_form(tiny_dir: Path, tmp_path: Path) -> None:
    given: list[Any] = ["Once upon", ["Once upon"], [[72, 73]], [72, 73]]
    lines = [{"url": "/v1/completions", "body": {"prompt": prompt}} for prompt in given]
    tokenizer = Tokenizer.from_pretrained(tiny_dir)
    raw = len(tokenizer.encode("Once upon"))
    chat = len(tokenizer.apply_chat_template([{"role": "user", "content": "Once upon"}]))
    assert prompt_tokens(tiny_dir, tmp_path / "a", lines) == [raw, raw, 2, 2]
    assert prompt_tokens(tiny_dir, tmp_path / "b", [{"prompt": prompt} for prompt in given]) == [chat, chat, 2, 2]


def test_an_option_that_a_line_cannot_take_is_its_error(tiny_dir: Path, tmp_path: Path) -> None:
    ids, text = {"prompt": [72, 73]}, {"url": "/v1/completions", "body": {"prompt": "hi"}}
    lines: list[dict[str, Any]] = [ids, text, {"messages": CHAT}]
    of_ids, of_text = "token ids are a whole prompt", "/v1/completions does not chat"
    for options, name in (
        (["--system", "Be brief."], "--system"),
        (["--chat"], "--chat"),
        (["--system=a", "--template-arg", "tools=[]"], "--system, tools"),
    ):
        *errors, n_tokens = prompt_tokens(tiny_dir, tmp_path / name, lines, *options)
        assert errors == [f"{name} belongs to a chat, and {reason}: leave it out" for reason in (of_ids, of_text)]
        assert isinstance(n_tokens, int) or name == "--system, tools"  # which the tiny template does not read
    for options in (["--raw"], ["--raw", "--special"]):
        *plain, error = prompt_tokens(tiny_dir, tmp_path / "raw", lines, *options)
        assert plain == [2, 3]
        assert error == '"messages" belongs to a chat, and --raw continues plain text: leave it out'
    lines = [
        ids | {"tools": []},
        ids | {"chat_template_kwargs": {"x": 1}},
        {"messages": [{"role": "user"}]},
        {"messages": ["hi"]},
    ]
    *errors, no_content, no_message = prompt_tokens(tiny_dir, tmp_path / "tools", lines)
    assert errors == [f"{name} belongs to a chat, and {of_ids}: leave it out" for name in ("tools", "x")]
    assert "content" in no_content
    assert "messages[0]" in no_message


class Feed(io.RawIOBase):
    """A pipe of 500 lines that counts those that were read."""

    n_lines = 500

    def __init__(self) -> None:
        self.taken = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        self.taken += 1
        line = {"prompt": [1], "max_tokens": 1 + (self.taken - 1) % 7}
        return json.dumps(line).encode() + b"\n" if self.taken <= self.n_lines else b""


def test_lines_are_read_as_they_are_needed(tmp_path: Path) -> None:
    feed, ahead = Feed(), []
    stats = Stats(1, 0, 1, 0.0, None, None, None, None)

    def completions(
        prompts: Iterable[list[int]], settings: Iterable[SamplingParams]
    ) -> Iterator[tuple[int, Completion]]:
        pairs = enumerate(zip(prompts, settings, strict=True))
        while batch := list(itertools.islice(pairs, 16)):
            for index, (_, sampling) in batch:
                ahead.append(feed.taken - index)
                yield index, Completion("", [sampling.max_tokens or 0], "stop", None, [], stats)

    llm: Any = SimpleNamespace(completions=completions, config=SimpleNamespace(max_seq_len=9))
    batch = Batch("feed", feed, tmp_path / "out")  # type: ignore[arg-type]
    batch.answer(llm, SamplingParams(), parser().parse_args([]), {})
    assert max(ahead) <= 16
    found = results(tmp_path / "out")
    assert [result["index"] for result in found] == list(range(feed.n_lines))
    assert [result["token_ids"][0] for result in found] == [1 + index % 7 for index in range(feed.n_lines)]
