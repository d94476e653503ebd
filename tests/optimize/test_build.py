"""Building the native operators: once, safely; and what happens where they cannot be built."""

import hashlib
import os
import re
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
from tests.optimize.fake_compiler import fake_compiler, is_whole, links
from tests.tiny_models import random_tokens, tiny_model


@pytest.fixture
def untried() -> Iterator[None]:
    """As in a process that has not asked for the operators yet."""
    build._loaded.cache_clear()
    yield
    build._loaded.cache_clear()


def test_is_built_once_and_says_so(
    tmp_path: Path, compiler: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = built(tmp_path / "deep" / "cache")
    assert is_whole(library)
    assert capsys.readouterr().err == "building the fast operators, once: 20 to 100 s\n"
    assert built(library.parent) == library
    assert capsys.readouterr() == ("", "")
    assert links(log) == 1
    assert len(log.read_text().splitlines()) == len(build.ISA_VARIANTS) + 2


def test_the_name_depends_on_what_the_library_must_match(
    tmp_path: Path, compiler: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, torch and flags; not the compiler, which may be absent where the library is used."""
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
    monkeypatch.setattr(build, "_FLAGS", ("-O0",))
    names.append(built(cache))
    assert len(set(names)) == links(log) == 5
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "clang++", log)))
    assert built(cache) == names[-1]


@pytest.mark.parametrize("damage", ["empty", "truncated", "longer", "another byte"])
def test_a_damaged_library_is_built_again(tmp_path: Path, compiler: Path, log: Path, damage: str) -> None:
    library = built(tmp_path / "cache")
    whole = library.read_bytes()
    library.write_bytes(
        {"empty": b"", "truncated": whole[:20], "longer": whole + b"0", "another byte": b"W" + whole[1:]}[damage]
    )
    assert built(library.parent).read_bytes() == whole
    assert links(log) == 2


def test_a_library_that_does_not_load_is_built_again_once(
    tmp_path: Path, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is whole, but was built on another system: here it is a text with its hash."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda source, compiler, library, machine: library.write_bytes(real))
    loaded = []
    real = signed(b"here")

    def load(path: str) -> None:
        loaded.append(Path(path).read_bytes())
        if loaded[-1] != real:
            raise OSError("GLIBC_2.99 not found")

    monkeypatch.setattr(torch.ops, "load_library", load)
    library = built()
    library.write_bytes(signed(b"elsewhere"))
    assert load_kernels()
    assert loaded == [signed(b"elsewhere"), real]


def signed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


@pytest.mark.parametrize("words", ["{}", "  {} ", "env {}", "'{}'", '"{}" -pipe'])
def test_the_compiler_may_be_several_words(
    tmp_path: Path, compiler: Path, log: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv("CXX", words.format(compiler))
    assert is_whole(built(tmp_path / "cache"))
    assert ("-pipe -shared" in log.read_text()) == ("-pipe" in words)


@pytest.mark.slow
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
    assert is_whole(Path(one.strip()))
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
    assert is_whole(library)


FAIL = 'case "$1" in -O3) echo note >&2; echo "kernels.cpp:1: error: no such instruction" >&2; exit 1;; esac'
WITHOUT = {
    "failing compiler": ({}, FAIL, r"c\+\+ exited with 1: kernels.cpp:1: error: no such instruction"),
    "silent compiler": ({}, 'case "$1" in -O3) exit 3;; esac', r"c\+\+ exited with 3:"),
    "no such compiler": ({"CXX": "nonexistent"}, "", "no compiler nonexistent on PATH"),
    "no command": ({"CXX": "g++ '"}, "", "CXX is not a command: No closing quotation"),
    "empty path": ({"CXX": "", "PATH": ""}, "", r"no compiler g\+\+ on PATH"),
    "no place for a cache": ({"XDG_CACHE_HOME": "/dev/null", "TMPDIR": "/proc"}, "", "Not a directory"),
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
