"""Reading JSON and writing directories: a fault is one sentence, and nothing on disk is ever half written."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_mini.checkpoint.files import new_directory, read_json, write_json
from llama_mini.errors import CheckpointError, CheckpointFormatError, CheckpointPathError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": 1} trailing', "is not JSON"),
        (b"<!DOCTYPE html><html></html>", "is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"null", "not an object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", "5000 digits"),
    ],
    ids=["empty", "cut", "trailing", "html", "lfs", "latin-1", "list", "null", "nested", "digits"],
)
def test_what_is_no_json_object_is_one_sentence_with_the_files_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < len(str(file)) + 250


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(CheckpointPathError, match=f"cannot read {path}"):
            read_json(path)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, None, True], "a": {"name": "日本語 ▁ \U0001f999"}, "eps": 1e-05}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert "日本語" in (tmp_path / "a.json").read_text(encoding="utf-8")
    bom = tmp_path / "bom.json"
    bom.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert read_json(bom) == data


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


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="model"), new_directory(tmp_path / "file" / "model"):
        raise AssertionError("there is no folder to fill")


def test_a_directory_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model"):
        pass
    (tmp_path / "other").mkdir()
    assert stat.S_IMODE(os.stat(tmp_path / "model").st_mode) == stat.S_IMODE(os.stat(tmp_path / "other").st_mode)
