"""The options as people type them: names of other engines, several ways to give the prompt, and mistakes."""

import shutil
from pathlib import Path

import pytest

from llama_mini.__main__ import main
from llama_mini.cli.options import parser
from llama_mini.lab.__main__ import parser as lab_parser

OURS = "--max-tokens 9 --temperature 1 --top-k 5 --seed 4 --threads 1 --system Be. hello"
THEIRS = [
    "-n 9 --temp 1 --top_k 5 -s 4 -t 1 -sys Be. -p hello",
    "--n-predict 9 --temp=1 --top-k 5 --seed 4 --threads 1 --system-prompt Be. --prompt=hello",
    "--max_new_tokens 9 --temperature 1 --top_k=5 --seed 4 --threads 1 --system Be. hello",
]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = main(["generate", *map(str, words)])
    except SystemExit as end:  # from argparse
        code = end.code
    return code, *capsys.readouterr()


def test_names_of_other_engines(capsys: pytest.CaptureFixture[str], tiny_dir: Path) -> None:
    code, text, err = run(capsys, "--model", tiny_dir, *OURS.split())
    assert (code, text != "", err) == (0, True, "")
    for words in THEIRS:
        assert run(capsys, "-m", tiny_dir, *words.split()) == (0, text, ""), words
    assert run(capsys, f"--model={tiny_dir}", *OURS.split()) == (0, text, "")


def test_ways_to_give_the_prompt(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf-hi -n 3\n")
    ways = [["--", "-hi -n 3"], ["--prompt=-hi -n 3"], ["-f", tmp_path / "text"]]
    said = [run(capsys, "--model", tiny_dir, "--max-tokens", 8, *words) for words in ways]
    assert said[0] == said[1] == said[2]
    assert said[0][0] == 0
    assert run(capsys, "--model", tiny_dir, "--max-tokens", 8, "  ")[0] == 0


def test_a_value_may_begin_like_an_option() -> None:
    args = parser().parse_args(
        ["-p", "-hello", "--stop", "---", "--stop", "-_x", "--min_p", "-.5", "--stop=--raw", "-n", "3"]
    )
    assert (args.prompt_option, args.stop, args.min_p, args.max_tokens) == ("-hello", ["---", "-_x", "--raw"], -0.5, 3)
    assert {parser().parse_args(["x", name, "m"]).draft for name in ("--draft", "-md", "--draft_model")} == {"m"}
    args = parser().parse_args(["--batch", "-", "--output", "-"])
    assert (args.batch, args.output) == ("-", "-")


@pytest.mark.parametrize(
    "words",
    [
        "edit norm eps=1 gain=2 --tokens 64 --json",
        "edit --tokens 64 --json norm eps=1 gain=2",
        "edit norm --tokens 64 eps=1 --json gain=2",
        "edit norm --js eps=1 --tok 64 gain=2",
        "edit --json norm --tokens=64 -- eps=1 gain=2",
        "edit --tokens 64 norm --json -- eps=1 gain=2",
    ],
)
def test_options_stand_anywhere_among_other_words(words: str) -> None:
    args = lab_parser().parse_args(words.split())
    assert (args.pattern, args.settings, args.tokens, args.json) == ("norm", ["eps=1", "gain=2"], 64, True)


def test_an_option_of_several_values_takes_all_that_follow() -> None:
    args = lab_parser().parse_args(["sweep", "pre", "--dim", "64", "post", "--depths", "2", "3"])
    assert (args.plans, args.dim, args.depths) == (["pre", "post"], 64, [2, 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop", "--raw", "hi"], "argument --stop: expected one argument, after = if it begins with -"),
        (["--stop", "-n=3"], "argument --stop: expected one argument, after = if it begins with -"),
        (["--stop", "--no-option"], "argument --stop: expected one argument, after = if it begins with -"),
        (["--nonsense", "hi"], "unrecognized arguments: --nonsense; a prompt that begins with - goes after --"),
        (["--temprature", "1"], "unrecognized arguments: --temprature (did you mean --temperature?)"),
        (["--max_tokns=1", "hi"], "unrecognized arguments: --max_tokns=1 (did you mean --max-tokens?)"),
        (["hi", "ho"], "unrecognized arguments: ho\n"),
        (["hi", "--prompt", "ho"], "argument --prompt: not allowed with argument PROMPT"),
        (["hi", "--file", "f"], "argument --file: not allowed with argument PROMPT"),
        (["-p", "hi", "-f", "f"], "argument --file: not allowed with argument --prompt"),
        (["--batch", "b", "-f", "f"], "argument --file: not allowed with argument --batch"),
        (["--file", "/nowhere\x1b"], "cannot read /nowhere\\x1b: No such file or directory"),
        (["tests/tiny"], "PROMPT is the path of a model: give --model tests/tiny"),
        (["a\udcff"], "the prompt is not UTF-8 text: invalid start byte at byte 1"),
        (["--system", "a\udcff", "hi"], "--system is not UTF-8 text"),
        (["--stop", "a\udcff", "hi"], "--stop is not UTF-8 text"),
        (["-p", ""], "the prompt is empty"),
    ],
    ids=repr,
)
def test_a_mistake_is_named(capsys: pytest.CaptureFixture[str], tiny_dir: Path, words: list[str], message: str) -> None:
    code, out, err = run(capsys, "--model", tiny_dir, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_name_that_a_command_has_not_is_named_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["score", "-p", "x"], ["info", "-p", "x"], ["lab", "norms", "-p", "x"]):
        with pytest.raises(SystemExit):
            main(command)
        assert "unrecognized arguments: -p" in capsys.readouterr().err


def test_the_path_of_a_model_is_no_prompt(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_dir, tmp_path / "tiny")
    (tmp_path / "m.gguf").touch()
    (tmp_path / "notes.txt").touch()
    for name in ("tiny", "./tiny/model.safetensors", "m.gguf"):
        code, out, err = run(capsys, "--model", "tiny", name)
        assert (code, out) == (2, "")
        assert err == f"error: PROMPT is the path of a model: give --model {name}; to ask about it, use --prompt\n"
        assert run(capsys, "--model", "tiny", "--max-tokens", "2", "--prompt", name)[0] == 0
    for prompt in ("notes.txt", "x" * 400, "a\0b"):
        assert run(capsys, "--model", "tiny", "--max-tokens", "2", "--raw", prompt)[0] == 0
