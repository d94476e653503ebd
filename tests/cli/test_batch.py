"""Prompts from a file: every line gets its result, once, whatever is killed or wrong."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from llama_mini import LLM, SamplingParams
from llama_mini.generate import main
from tests.processes import child

LINES = [
    {"prompt": f"number {i} {'and more ' * (i % 5)}", "id": f"row-{i}", "max_tokens": 4 + i % 3} for i in range(40)
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def command(tiny_dir, prompts: Path, *more: str) -> list[str]:
    return ["--model", str(tiny_dir), "--dtype", "float32", "--raw", "--batch", str(prompts), *more]


def results(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda result: result["index"])


def test_each_line_gets_what_it_gets_alone(tiny_dir, prompts: Path) -> None:
    assert main(command(tiny_dir, prompts)) == 0
    found = results(Path(f"{prompts}.results.jsonl"))
    assert [result["id"] for result in found] == [line["id"] for line in LINES]
    llm = LLM(tiny_dir, dtype="float32")
    for line, result in zip(LINES, found, strict=True):
        (alone,) = llm.generate(line["prompt"], SamplingParams(max_tokens=line["max_tokens"]))
        assert result["token_ids"] == alone.token_ids
        assert result["text"] == alone.text
        assert result["finish_reason"] == alone.finish_reason
        assert result["error"] is None


def test_a_second_run_adds_nothing(tiny_dir, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        assert main(command(tiny_dir, prompts, "--output", str(output))) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == len(LINES)


def test_half_a_line_is_dropped_and_the_rest_answered(tiny_dir, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    main(command(tiny_dir, prompts, "--output", str(output)))
    whole = results(output)
    data = output.read_bytes()
    output.write_bytes(data[: len(data) // 2])
    assert main(command(tiny_dir, prompts, "--output", str(output))) == 0
    again = results(output)
    assert [result["index"] for result in again] == list(range(len(LINES)))
    assert [result["token_ids"] for result in again] == [result["token_ids"] for result in whole]


def test_a_killed_run_goes_on(tiny_dir, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = command(tiny_dir, prompts, "--output", str(output), "--threads", "1")
    with child(sys.executable, "-m", "llama_mini.generate", *words, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (output.exists() and output.stat().st_size):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        process.kill()
    assert main(words) == 0
    assert [result["index"] for result in results(output)] == list(range(len(LINES)))


WRONG = [
    ("{", "is not JSON"),
    ("[1]", "must be an object"),
    ("{}", "must be an object"),
    ('{"prompt": "a", "messages": []}', "must be an object"),
    ('{"prompt": "a", "temprature": 1}', "unknown setting 'temprature'; did you mean temperature?"),
    ('{"prompt": "a", "n": 2}', "n must be 1: a line has one result"),
    ('{"prompt": "a", "num_return_sequences": 2}', "n must be 1: a line has one result"),
    ('{"prompt": "a", "logits_processors": ["x"]}', "logits_processors must be"),
    (json.dumps({"prompt": "a" * 600}), "prompt tokens and 1 new one exceed the context of 512"),
    ('{"prompt": "a", "text": "\xff"}', "is not UTF-8 text: invalid start byte"),
    ('{"prompt": "a", "chat_template_kwargs": 3}', "chat_template_kwargs must be an object, not 3"),
    ('{"prompt": "a", "chat_template_kwargs": {"messages": 3}}', "messages is set by the command: leave it out"),
    ('{"prompt": "a", "tools": []}', "tools belongs to a chat, and --raw continues plain text"),
    ('{"prompt": "a", "temperature": -1}', "temperature must be"),
    ('{"prompt": [99999999]}', "outside the vocabulary"),
    ('{"prompt": []}', "empty"),
    ('{"prompt": 5}', "a prompt is a text or a list of token ids, whole numbers, not 5"),
    ('{"prompt": ["a", "b"]}', "a prompt is a text or a list of token ids, whole numbers, not 'a'"),
    ('{"prompt": "a", "prompt": "b"}', "the line: 'prompt' is given twice"),
    ('{"prompt": "a", "chat_template_kwargs": {"x": 1, "x": 2}}', "the line: 'x' is given twice"),
    ('{"prompt": "a", "logit_bias": {"7": 1, "07": 2}}', "logit_bias: 7 is given twice"),
    ('{"messages": [{"role": "user", "content": "a"}]}', '"messages" belongs to a chat, and --raw continues'),
    ('{"messages": []}', ""),
    ('{"messages": null}', ""),
    ('{"prompt": null}', ""),
    ('{"prompt": "a", "logit_bias": {"' + "9" * 5000 + '": 1}}', "logit_bias"),
    ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    ('{"prompt": "a", "max_tokens": ' + "9" * 5000 + "}", "is not JSON"),
    ('{"prompt": "a", "max_tokens": 100000000}', "exceed the context"),
]


def test_a_wrong_line_fails_alone(tiny_dir, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    right = '{"prompt": "right", "max_tokens": 3}\n'
    path.write_bytes((right + "\n" + "".join(f"{line}\n{right}" for line, _ in WRONG)).encode("latin-1"))
    assert main(command(tiny_dir, path)) == 0
    first, *others = results(Path(f"{path}.results.jsonl"))
    assert first["index"] == 0
    assert [result["index"] for result in others] == list(range(2, 2 * len(WRONG) + 2))
    for (line, said), wrong, after in zip(WRONG, others[::2], others[1::2], strict=True):
        assert wrong["finish_reason"] == "error", line
        assert said in wrong["error"], line
        assert after["error"] is None
        assert after["token_ids"] == first["token_ids"]
        assert len(after["token_ids"]) == 3


def test_an_id_of_any_json(tiny_dir, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "id": {"x": ["\\ud800", 1.5]}, "max_tokens": 2}\n', encoding="utf-8")
    for _ in range(2):
        assert main(command(tiny_dir, path)) == 0
    (found,) = results(Path(f"{path}.results.jsonl"))
    assert found["id"] == {"x": ["\ud800", 1.5]}
