"""A wheel that carries the built operators: where no compiler is, they load from it."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from llama_mini.optimize import build
from tests.optimize.fake_compiler import links

ROOT = Path(__file__).parents[2]
LOADED = """
import llama_mini, torch
from llama_mini.optimize.build import built, load_kernels
assert load_kernels()
print(llama_mini.__file__, built(), torch.ops.llama_mini.isa_variants())
"""


@pytest.mark.slow
def test_a_wheel_needs_no_compiler(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts/make_wheel.py", tmp_path / "dist"], check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.startswith("llama_mini-")
    assert not wheel.name.endswith("-any.whl")
    installed, nowhere = tmp_path / "installed", tmp_path / "nowhere"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(pip, check=True)
    nowhere.mkdir()
    environment = os.environ | {"PATH": str(nowhere), "XDG_CACHE_HOME": str(nowhere), "PYTHONPATH": str(installed)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADED], cwd=nowhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(str(installed))
    assert str(installed / "llama_mini" / "optimize" / "prebuilt") in done.stdout
    assert not list(nowhere.iterdir())


def test_a_wheel_for_another_processor_has_what_would_be_built_there(
    tmp_path: Path, compiler: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, ROOT / "scripts/make_wheel.py", tmp_path / "dist", "--machine", "aarch64"]
    subprocess.run(words, check=True, env=environment)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-linux_aarch64.whl")
    (library,) = (name for name in ZipFile(wheel).namelist() if name.endswith(".so"))
    assert links(log) == 3  # of the library, and of empty ones in place of torch's
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.built(tmp_path / "there").name == Path(library).name
