"""The options for the structure of the answer, alone, in a chat and for the lines of a batch."""

import json
import re
from pathlib import Path

import pytest

from llama_mini.cli.options import chat_parser, sampling
from llama_mini.generate import main

SCHEMA = '{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}'
GRAMMAR = 'root ::= "a"+ "é"\n'


def said(capsys: pytest.CaptureFixture[str], tiny_dir: Path, *options: object) -> str:
    assert main(["--model", str(tiny_dir), "--temperature", "1", "--max-tokens", "200", *map(str, options), "hi"]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_each_option_holds(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "schema").write_text(SCHEMA)
    (tmp_path / "grammar").write_text(GRAMMAR)
    for option, schema in (("--json-schema", SCHEMA), ("--json-schema", tmp_path / "schema"), ("-j", f" {SCHEMA}")):
        assert len(json.loads(said(capsys, tiny_dir, option, schema))) in (2, 3)
    assert re.fullmatch("-[0-9]{3}", said(capsys, tiny_dir, "--regex", "-\\d{3}"))
    assert said(capsys, tiny_dir, "--choice=--yes", "--choice", "no") in ("--yes", "no")
    for option in ("--grammar", "--grammar-file"):
        assert re.fullmatch("a+é", said(capsys, tiny_dir, option, tmp_path / "grammar", "--logit-bias", "195=9"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--regex", "a", "--choice", "b"], "regex and choice both say what the answer may be"),
        (["--regex", "("], "regex: unclosed group"),
        (["--regex", ""], "regex must be a non-empty text, not ''"),
        (["--json-schema", "no/such"], "cannot read no/such: No such file"),
        (["--json-schema", '{"a'], "json_schema must be a JSON schema"),
        (["--json-schema", '{"type": "set"}'], "json_schema: Invalid type: set"),
        (["--grammar", GRAMMAR], "cannot read root ::= "),
    ],
)
def test_a_wrong_one_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, args: list[str], message: str
) -> None:
    assert main(["--model", str(tiny_dir), *args, "hi"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_chat_has_the_same_options(tmp_path: Path) -> None:
    (tmp_path / "grammar").write_text(GRAMMAR)
    params = sampling(chat_parser("llama-mini chat").parse_args(["--grammar", str(tmp_path / "grammar")]))
    assert params.structure == ("grammar", GRAMMAR)


def test_lines_of_a_batch_have_their_own(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    """A run does not go on when the file of the schema has changed."""
    schema, batch = tmp_path / "schema.json", tmp_path / "batch"
    schema.write_text(SCHEMA)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 90}
    body["response_format"] = {"type": "json_schema", "json_schema": {"schema": {"const": "é"}}}
    lines = [{"prompt": "hi"}, {"prompt": "hi", "regex": "a"}, {"body": body}, {"prompt": "hi", "choice": []}]
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--model", str(tiny_dir), "--batch", str(batch), "--temperature", "1", "--seed", "1"]
    assert main(command) == 0
    results = map(json.loads, Path(f"{batch}.results.jsonl").read_text().splitlines())
    by_index = {result["index"]: result for result in results}
    assert by_index[1]["text"] == "a"
    assert by_index[2]["text"] == '"é"'
    assert "choice must be a list of non-empty texts" in by_index[3]["error"]
    Path(f"{batch}.results.jsonl").unlink()
    batch.write_text(json.dumps(lines[0]) + "\n")
    command += ["--json-schema", str(schema)]
    assert main(command) == 0
    assert main(command) == 0
    schema.write_text(SCHEMA.replace("2", "1"))
    capsys.readouterr()
    assert main(command) == 2
    assert "json_schema" in capsys.readouterr().err
