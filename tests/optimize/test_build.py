"""Building the native operators: once, safely; and what happens where they cannot be built.

A script in place of the compiler logs its arguments and ends at once.
"""

import os
import re
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_mini.errors import LlamaMiniWarning, RequestError
from llama_mini.optimize import build, optimize
from llama_mini.optimize.build import built, load_kernels
from tests.tiny_models import random_tokens, tiny_model

FAKE = """#!/bin/sh
{first}
[ "$1" = -dumpfullversion ] && {{ echo {version}; exit; }}
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
echo whole > "$2"
"""


@pytest.fixture
def untried() -> Iterator[None]:
    """As in a process that has not asked for the operators yet."""
    build._loaded.cache_clear()
    yield
    build._loaded.cache_clear()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def compiler(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script, named by CXX."""
    path = fake_compiler(tmp_path / "c++", log)
    monkeypatch.setenv("CXX", str(path))
    return path


def fake_compiler(path: Path, log: Path, first: str = "", version: str = "12.2.0") -> Path:
    path.write_text(FAKE.format(log=log, first=first, version=version))
    path.chmod(0o700)
    return path


def links(log: Path) -> int:
    return sum("-shared" in line for line in log.read_text().splitlines())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_is_built_once_and_says_so(
    tmp_path: Path, compiler: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = built(tmp_path / "deep" / "cache")
    assert library.read_text() == "whole\n"
    assert capsys.readouterr().err == "building the fast operators, once, about 10 s\n"
    assert built(library.parent) == library
    assert capsys.readouterr() == ("", "")
    assert links(log) == 1
    assert len(log.read_text().splitlines()) == len(build.ISA_VARIANTS) + 2


def test_nobody_else_can_enter_the_folder(tmp_path: Path, compiler: Path) -> None:
    old = os.umask(0)
    library = built(tmp_path / "cache")
    os.umask(old)
    assert mode(library.parent) == 0o700
    assert not mode(library) & 0o077
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".lock"}
    library.parent.chmod(0o755)
    built(library.parent)
    assert mode(library.parent) == 0o700


@pytest.mark.parametrize("bits", [0o770, 0o702])
def test_a_folder_that_others_could_write_is_not_trusted(tmp_path: Path, compiler: Path, bits: int) -> None:
    library = built(tmp_path / "cache")
    library.parent.chmod(bits)
    with pytest.raises(OSError, match="is writable by other users: remove it"):
        built(library.parent)


def test_a_folder_of_another_user_is_not_trusted(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(OSError, match="cache belongs to another user"):
        built(tmp_path / "cache")


def test_the_name_depends_on_torch_compiler_flags_and_source(
    tmp_path: Path, compiler: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, source = tmp_path / "cache", tmp_path / "native"
    source.mkdir()
    (source / "kernels.cpp").write_text("int a;")
    monkeypatch.setattr(build, "files", lambda package: tmp_path)
    names = [built(cache)]
    (source / "kernels.cpp").write_text("int b;")
    names.append(built(cache))
    (source / "kernels.cpp").rename(source / "other.cpp")
    names.append(built(cache))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    names.append(built(cache))
    fake_compiler(compiler, log, version="13.1.0")
    names.append(built(cache))
    monkeypatch.setattr(build, "_FLAGS", ("-O0",))
    names.append(built(cache))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "clang++", log, version="13.1.0")))
    names.append(built(cache))
    assert len(set(names)) == links(log) == 7


def test_of_two_processes_at_once_one_builds(tmp_path: Path, log: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # Whoever builds waits in the compiler until both have started.
    path = fake_compiler(tmp_path / "c++", log, first=f'case "$*" in *-shared*) cat {gate};; esac')
    code = "import sys\nfrom llama_mini.optimize.build import built\nprint(flush=True)\nprint(built())"
    environment = os.environ | {"CXX": str(path), "XDG_CACHE_HOME": str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        gate.write_text("go")
        (one, other) = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert one == other
    assert Path(one.strip()).read_text() == "whole\n"
    assert links(log) == 1


def test_a_build_that_was_killed_is_done_again(tmp_path: Path, compiler: Path, log: Path) -> None:
    killer = 'case "$*" in *-shared*) for w; do :; done; echo half > "$w"; kill -9 $PPID; exit;; esac'
    fake_compiler(compiler, log, first=killer)
    code = "import sys, pathlib, llama_mini.optimize.build as b; b.built(pathlib.Path(sys.argv[1]))"
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")], capture_output=True, timeout=100)
    assert child.returncode == -9
    (half,) = tmp_path.rglob("*.so")
    assert half.read_text() == "half\n"
    fake_compiler(compiler, log)
    library = built(tmp_path / "cache")
    assert library != half
    assert library.read_text() == "whole\n"


FAIL = 'case "$1" in -O3) echo note >&2; echo "kernels.cpp:1: error: no such instruction" >&2; exit 1;; esac'
WITHOUT = {
    "failing compiler": ({}, FAIL, r"c\+\+ exited with 1: kernels.cpp:1: error: no such instruction"),
    "silent compiler": ({}, 'case "$1" in -O3) exit 3;; esac', r"c\+\+ exited with 3:"),
    "compiler without a version": ({}, "exit 2", r"c\+\+ exited with 2:"),
    "no such compiler": ({"CXX": "nonexistent"}, "", "no compiler nonexistent on PATH"),
    "empty path": ({"CXX": "", "PATH": ""}, "", r"no compiler g\+\+ on PATH"),
    "no place for a cache": ({"XDG_CACHE_HOME": "", "HOME": "/dev/null"}, "", "Not a directory"),
    "broken library": ({}, "", "Could not load this library: .*operators-"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_without_operators_there_is_one_warning_and_all_works(
    tmp_path: Path, compiler: Path, log: Path, untried: None, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    environment, first, reason = WITHOUT[case]
    fake_compiler(compiler, log, first)
    for name, value in ({"XDG_CACHE_HOME": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert not load_kernels()
        fast = optimize(tiny_model())
    assert [warning.category for warning in caught] == [LlamaMiniWarning]
    assert re.match(rf"the fast operators could not be built or loaded \(.*{reason}.*\): ", str(caught[0].message))
    tokens = random_tokens(2, 5)
    assert (fast(tokens) - tiny_model()(tokens)).abs().max() < 1e-4
    assert case == "broken library" or not list(tmp_path.rglob("*.so"))


def test_off_builds_nothing(
    tmp_path: Path, compiler: Path, log: Path, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_kernels("off") is False
    assert not log.exists()


@pytest.mark.parametrize("kernels", ["on", "", None, True, ["auto"]])
def test_another_setting_is_refused(kernels: str) -> None:
    with pytest.raises(RequestError, match=r"^unknown kernels .*; known: auto, off$"):
        load_kernels(kernels)
