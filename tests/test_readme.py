"""What is written for readers: the examples run, links and pictures are there, sizes are those of the files."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import update_readme

ROOT = update_readme.ROOT
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in update_readme.documents()}
BLOCK = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def examples(name: str, language: str) -> str:
    return "".join(text for kind, text in BLOCK.findall(TEXTS[name]) if kind == f"{language} examples")


PYTHON, SHELL = (
    [
        pytest.param(name, marks=[] if (name, language) == ("README.md", "python") else pytest.mark.slow)
        for name in TEXTS
        if examples(name, language)
    ]
    for language in ("python", "sh")
)


@pytest.fixture
def workplace(smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run examples in: with a license, and the default checkpoint where a checkout has it."""
    shutil.copy(ROOT / "LICENSE", tmp_path)
    (tmp_path / "weights").symlink_to(smollm2_dir.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PYTHON)
@pytest.mark.usefixtures("workplace")
def test_python_examples_run(name: str) -> None:
    exec(compile(examples(name, "python"), name, "exec"), {})


@pytest.mark.parametrize("name", SHELL)
def test_shell_examples_run(name: str, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in examples(name, "sh").replace("\\\n", "").splitlines():
        run_line(line)
    if name == "README.md":
        assert (workplace / "results.jsonl").read_text(encoding="utf-8").count("\n") == 1
        printed = capfd.readouterr()
        assert "perplexity" in printed.out
        assert "tok/s" in printed.err


def run_line(line: str) -> None:
    """A command of this package alone on its line runs in this process, which has torch already; the rest in bash."""
    words = list(shlex.shlex(line, posix=True, punctuation_chars=True))
    alone = not {"|", ">", "<", "&&", ";"} & set(words)
    words = shlex.split(line, comments=True)
    if alone and words[:1] == ["llama-mini"]:
        assert import_module("llama_mini.__main__").main(words[1:]) == 0, line
    elif alone and words[:2] == ["python", "-m"]:
        module = import_module(words[2])
        main = module.main if hasattr(module, "main") else import_module(f"{words[2]}.__main__").main
        assert main(words[3:]) == 0, line
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], env=os.environ | {"PATH": path}, check=True)


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_pictures_are_there(name: str) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(BLOCK.sub("", TEXTS[name])) if "://" not in target]
    assert [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_line_counts_are_those_of_the_files(name: str) -> None:
    assert update_readme.with_counts(TEXTS[name], (ROOT / name).parent) == TEXTS[name], "run scripts/update_readme.py"


def test_the_first_page_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200
