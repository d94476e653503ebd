"""llama-mini: every command under one name, and what it makes of words that are no command."""

import io
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_mini import Llama, __main__
from llama_mini.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def console_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/llama-mini"])


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:  # from argparse
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture
def options(tiny_dir: Path) -> list[object]:
    return ["--model", tiny_dir, "--dtype", "float32", "--kernels", "off"]


def test_the_console_script_is_this_function() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"llama-mini": f"{main.__module__}:{main.__name__}"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert list(COMMANDS) == ["generate", "chat", "serve", "score", "info", "convert", "eval", "lab", "bench"]
    for name, meaning in COMMANDS.items():
        assert f"  {name:10}{meaning}\n" in out
    assert out.startswith("usage: llama-mini COMMAND ...\n")
    assert all(len(line) <= 80 for line in out.splitlines())
    monkeypatch.setattr(sys, "argv", ["/somewhere/llama_mini/__main__.py"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert run(capsys) == (0, out.replace("llama-mini", "python -m llama_mini"), "")  # nothing typed, at a terminal


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "score", "info", "convert", "lab"])
def test_help_of_a_command_fits_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: llama-mini {command} [")
    assert all(len(line) <= 80 for line in out.splitlines())


def test_help_and_version_do_not_import_torch() -> None:
    code = "import sys\nfrom llama_mini.__main__ import COMMANDS, main\n"
    code += "for words in [[], ['--version'], *([name] for name in COMMANDS if name not in ('eval', 'bench'))]:\n"
    code += "    try:\n        main([*words, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
    code += "    assert 'torch' not in sys.modules, words\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_no_command_is_a_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[object]
) -> None:
    more = [*options, "--max-tokens", 6]
    code, answer, err = run(capsys, "generate", *more, "say hi")
    assert (code, err) == (0, "")
    assert run(capsys, "say hi", *more) == run(capsys, *more, "say hi") == (0, answer, "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"say hi\n")))
    assert run(capsys, *more) == (0, answer, "")
    assert run(capsys, "generate", "chat", *more)[0] == 0  # a prompt that is the name of a command
    assert run(capsys, "--version")[1] == run(capsys, "generate", "--version")[1]


def test_a_prompt_that_resembles_a_command_is_answered_with_a_note(
    capsys: pytest.CaptureFixture[str], options: list[object]
) -> None:
    code, out, err = run(capsys, "genrate", *options, "--max-tokens", 3)
    assert (code, out != "") == (0, True)
    assert err == "note: 'genrate' is read as a prompt; the command is generate\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genrate", "x"], "'genrate' is not a command (did you mean generate?); put quotes around a prompt"),
        (["Why", "is", "it", "blue?"], "'Why' is not a command; put quotes around a prompt"),
        (["tests/tiny", "hello"], "'tests/tiny' is the path of a model: give it as --model tests/tiny"),
        (
            ["lab", "norms", "--modle", "x"],
            "llama-mini lab norms: error: unrecognized arguments: --modle x (did you mean --model?)",
        ),
        (["hi", "--nonsense"], "usage: llama-mini generate [options] [PROMPT]\nllama-mini generate: error: "),
        (["convert", "a"], "llama-mini convert: error: the following arguments are required: DST"),
        (["lab", "nothing"], "llama-mini lab: error: argument COMMAND: invalid choice: 'nothing'"),
        (["chat", "hello"], "llama-mini chat: error: unrecognized arguments: hello"),
        (["generate", ""], "the prompt is empty"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_two(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_info_is_that_of_generate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
) -> None:
    monkeypatch.setattr("llama_mini.cli.info.available_memory", lambda device: 2**30)
    code, out, err = run(capsys, "generate", "--info", "--model", tiny_dir, "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert run(capsys, "info", tiny_dir, "--dtype", "bfloat16") == (0, out, "")
    monkeypatch.setattr("llama_mini.cli.default_model.ensure_default_checkpoint", lambda: tiny_dir)
    assert run(capsys, "info", "--dtype", "bfloat16") == (0, out, "")
    assert run(capsys, "info", tiny_dir / "absent")[0] == 3


def test_chat_is_that_of_generate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[object]
) -> None:
    said = []
    for words in (["generate", "--interactive"], ["chat"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nmore\n")))
        said.append(run(capsys, *words, *options, "--max-tokens", 4, "--system", "Be brief."))
    assert said[0] == said[1]
    assert said[0][0] == 0
    assert said[0][1].count("\n") >= 2


def test_convert_writes_what_opens(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    assert run(capsys, "convert", tiny_dir, tmp_path / "new", "--dtype", "bfloat16") == (0, f"{tmp_path / 'new'}\n", "")
    assert Llama.from_pretrained(tmp_path / "new").dtype == torch.bfloat16
    assert run(capsys, "convert", tmp_path / "absent", tmp_path / "other")[0] == 3
    assert run(capsys, "convert", tiny_dir, tmp_path / "x", "--dtype", "float7")[0] == 2


def test_score_and_lab(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some words to score")
    for model in ("--model", "-m"):
        assert "perplexity" in run(capsys, "score", tmp_path / "text", model, tiny_dir, "--kernels", "off")[1]
        assert "layers.0.attention.pre_norm" in run(capsys, "lab", "norms", model, tiny_dir)[1]


def test_eval_and_bench_take_their_words_from_sys_argv(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tell() -> int:
        print(sys.argv)
        return 5

    monkeypatch.setattr("llama_mini.eval.__main__.main", tell)
    assert run(capsys, "eval", "--tasks", "x") == (5, "['llama-mini eval', '--tasks', 'x']\n", "")
    monkeypatch.setattr("bench.main", tell)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["llama-mini"])
    assert run(capsys, "bench", "--quick") == (5, "['llama-mini bench', '--quick']\n", "")
    monkeypatch.setattr(__main__, "__file__", str(tmp_path / "llama_mini" / "__main__.py"))
    monkeypatch.setattr(sys, "argv", ["llama-mini"])
    code, out, err = run(capsys, "bench")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "clone the repository" in err


def test_a_reader_that_is_gone_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "llama_mini", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
