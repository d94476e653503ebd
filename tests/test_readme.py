"""README keeps up with the code, and what it shows runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```(\w+) examples\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_line_counts_are_those_of_the_files() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "update_readme.py", "--check"], check=True)


def test_python_examples(smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smollm2_dir.parent.parent)
    code = "".join(text for language, text in EXAMPLES if language == "python")
    assert code.count("llm.generate(") >= 9
    exec(compile(code, "README.md", "exec"), {})


def test_shell_examples(smollm2_dir: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "LICENSE", tmp_path)
    shell = "".join(text for language, text in EXAMPLES if language == "sh")
    assert shell.count("python -m llama_mini") >= 6
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "results.jsonl").read_text(encoding="utf-8").count("\n") == 1
    for word in ("perplexity", '"token_ids"', '"prompt_logprobs"'):
        assert word in done.stdout.decode()
