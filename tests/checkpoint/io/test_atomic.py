"""Files and directories that are written whole or not at all."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_mini.checkpoint.io.atomic import check_new, new_directory, new_file
from llama_mini.checkpoint.io.lock import one_writer
from llama_mini.errors import CheckpointError, CheckpointPathError
from tests.processes import child


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with new_file(target) as made:
        made.write_text("new")
        (made.parent / "scratch").write_text("")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_fails_in_the_middle_stays_as_it_was(tmp_path: Path, fault: BaseException) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def write() -> None:
        with new_file(target) as made:
            made.write_text("ha")
            raise fault

    with pytest.raises(type(fault)):
        write()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("before", ["absent", "empty", "deep"])
def test_a_directory_appears_whole(tmp_path: Path, before: str) -> None:
    target = tmp_path / "parents" / "to" / "make" if before == "deep" else tmp_path / "model"
    if before == "empty":
        target.mkdir()
    with new_directory(target) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("content")
        assert not target.exists() or not any(target.iterdir())
    assert (target / "sub" / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ValueError("bad"), KeyboardInterrupt()])
def test_a_directory_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, fault: BaseException) -> None:
    expected = CheckpointPathError if isinstance(fault, OSError) else type(fault)

    def fill() -> None:
        with new_directory(tmp_path / "model") as directory:
            (directory / "half").write_text("of it")
            raise fault

    with pytest.raises(expected):
        fill()
    assert not any(tmp_path.iterdir())


def test_a_directory_whose_writer_is_killed_is_absent_and_the_next_writer_clears_up(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from llama_mini.checkpoint.io.atomic import new_directory
from llama_mini.checkpoint.io.lock import one_writer
target = Path(sys.argv[1])
with one_writer(target), new_directory(target) as directory:
    (directory / "half").write_text("of it")
    print("ready", flush=True)
    sys.stdin.read()
"""
    target = tmp_path / "model"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with child(sys.executable, "-c", script, target, **pipes) as writer:
        assert writer.stdout.readline() == b"ready\n"
        writer.kill()
    assert not target.exists()
    assert len(list(tmp_path.glob(".model.partial-*/half"))) == 1
    with one_writer(target), new_directory(target) as directory:
        (directory / "whole").write_text("")
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert {path.name for path in tmp_path.iterdir()} <= {"model", ".model.lock"}


def occupy_with_file(target: Path) -> None:
    target.write_text("in the way")


def occupy_with_folder(target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("{}")


@pytest.mark.parametrize("occupy", [occupy_with_file, occupy_with_folder])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_already_there_is_never_touched(tmp_path: Path, occupy: Callable[[Path], None], when: str) -> None:
    target = tmp_path / "model"
    if when == "before":
        occupy(target)

    def fill() -> None:
        with new_directory(target) as directory:
            assert when == "meanwhile"
            (directory / "config.json").write_text("new")
            occupy(target)

    with pytest.raises(CheckpointPathError, match=str(target)):
        fill()
    kept = target / "config.json" if target.is_dir() else target
    assert kept.read_text() in ("in the way", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["file/model", "x" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"cannot write .*{name}"), new_directory(tmp_path / name):
        raise AssertionError("there is no folder to fill")


def test_a_place_that_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointPathError, match=r"cannot write .*xx: File name too long"):
        check_new(tmp_path / ("x" * 300))

    def locked(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", locked)  # as of a folder of another user
    with pytest.raises(CheckpointPathError, match=rf"cannot write {tmp_path}: Permission denied"):
        check_new(tmp_path)


def test_a_directory_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model"):
        pass
    (tmp_path / "other").mkdir()
    assert stat.S_IMODE(os.stat(tmp_path / "model").st_mode) == stat.S_IMODE(os.stat(tmp_path / "other").st_mode)
