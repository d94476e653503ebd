"""Where the built operators are kept: in a folder that nobody else can write, wherever one can be had."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_mini.optimize import build
from llama_mini.optimize.build import built
from tests.optimize.fake_compiler import fake_compiler, is_whole, links, mode


def test_nobody_else_can_enter_the_folder(tmp_path: Path, compiler: Path) -> None:
    old = os.umask(0)
    library = built(tmp_path / "cache")
    os.umask(old)
    assert mode(library.parent) == 0o700
    assert not mode(library) & 0o077
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".lock"}


@pytest.mark.parametrize("bits", [0o770, 0o702])
def test_a_folder_that_others_could_write_is_not_trusted(tmp_path: Path, compiler: Path, bits: int) -> None:
    library = built(tmp_path / "cache")
    library.parent.chmod(bits)
    with pytest.raises(OSError, match="is writable by other users: remove it"):
        built(library.parent)


def test_a_library_that_others_could_write_is_built_again(tmp_path: Path, compiler: Path, log: Path) -> None:
    built(tmp_path / "cache").chmod(0o720)
    assert mode(built(tmp_path / "cache")) == 0o700
    assert links(log) == 2


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("part", ["folder", "library"])
def test_what_another_user_owns_is_not_trusted(tmp_path: Path, compiler: Path, log: Path, part: str) -> None:
    library = built(tmp_path / "cache")
    os.chown(library if part == "library" else library.parent, 12345, -1)
    if part == "folder":
        with pytest.raises(OSError, match="cache belongs to another user"):
            built(library.parent)
    else:
        assert built(library.parent).stat().st_uid == 0
        assert links(log) == 2


def test_what_root_owns_is_trusted(tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image was built as root and runs as another user."""
    library = built(tmp_path / "cache")
    root, stat = 0, os.stat(library)
    monkeypatch.setattr(os, "getuid", lambda: stat.st_uid + 1)
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result([*os.stat(path)[:4], root, *os.stat(path)[5:]]))
    assert built(library.parent) == library


def test_a_built_library_needs_no_compiler_and_no_writable_disk(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = built(tmp_path / "cache")
    library.with_suffix(".lock").unlink()
    monkeypatch.setenv("CXX", "nonexistent")
    for function in ("mkdir", "chmod", "touch"):
        monkeypatch.setattr(Path, function, read_only)
    monkeypatch.setattr(os, "open", read_only)
    assert built(library.parent) == library


def read_only(*args: object, **options: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def a_file_in_the_way(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def noexec(folder: Path, patch: pytest.MonkeyPatch) -> None:
    flags = lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC if path == folder else 0)  # noqa: E731
    patch.setattr(os, "statvfs", flags)


def writable_by_others(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def without_locks(folder: Path, patch: pytest.MonkeyPatch) -> None:
    real = build.FileLock

    def lock(path: Path, mode: int) -> Any:
        if path.parent == folder:
            raise NotImplementedError("FileSystem does not appear to support flock")
        return real(path, mode=mode)

    patch.setattr(build, "FileLock", lock)


@pytest.mark.parametrize("problem", [a_file_in_the_way, noexec, writable_by_others, without_locks])
def test_where_the_cache_folder_cannot_be_used_the_temporary_one_is(
    tmp_path: Path,
    compiler: Path,
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    problem(tmp_path / "cache" / "llama_mini" / "operators", monkeypatch)
    library = built()
    assert library.parent == tmp_path / f"llama_mini-{os.getuid()}" / "operators"
    assert mode(library.parent) == 0o700
    assert built() == library
    assert links(log) == 1


def test_the_temporary_files_of_the_compiler_go_beside_the_library(
    tmp_path: Path, compiler: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(compiler, log, first=f'case "$TMPDIR" in {tmp_path}/cache/*) ;; *) exit 1;; esac')
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    assert is_whole(built(tmp_path / "cache"))


def test_operators_are_expected_where_they_are_built_or_can_be(
    tmp_path: Path, compiler: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.expects_kernels()
    assert not build.expects_kernels("off")
    assert not log.exists()  # nothing was compiled to find out
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not build.expects_kernels()
    monkeypatch.setenv("CXX", str(compiler))
    built()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.expects_kernels()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert not build.expects_kernels()
