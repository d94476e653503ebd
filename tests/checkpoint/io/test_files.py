"""Reading JSON and writing directories: a fault is one sentence, and nothing on disk is ever half written."""

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_mini.checkpoint.io.files import decode_json, new_directory, read_json, write_json
from llama_mini.checkpoint.io.lock import one_writer
from llama_mini.errors import CheckpointError, CheckpointFormatError, CheckpointPathError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON but empty"),
        (b"{", "is not JSON: "),
        (b'{"a": 1} trailing', "is not JSON: Extra data"),
        (b"Entry not found", "is not JSON: "),
        (b"<!DOCTYPE html><html></html>", "is not JSON but an HTML page"),
        (LFS, "is not JSON but a Git LFS pointer: run `git lfs pull`"),
        (b"GGUF\3\0\0\0", "is not JSON but a GGUF file"),
        (b'{"a": "\xff"}', "is not UTF-8 text at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "is UTF-16 or UTF-32 text"),
        ('{"a": 1}'.encode("utf-16-be"), "is UTF-16 or UTF-32 text"),
        ('{"a": 1}'.encode("utf-32"), "is UTF-16 or UTF-32 text"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"null", "not an object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "is nested too deeply"),
        (b'{"hidden_size": ' + b"1" * 5000 + b"}", "holds a number of 5000 digits"),
        (b'{"hidden_size": -' + b"1" * 2_000_000 + b"}", "holds a number of 2000001 digits"),
        (b'{"rope_theta": 1e999}', "holds a number of 5 digits, which is too large"),
        (b'{"eps": NaN}', "holds NaN, which is no number in JSON"),
        (b'{"eps": [1, -Infinity]}', "holds -Infinity, which is no number in JSON"),
        (b'{"name": "\\ud800"}', "holds half of a surrogate pair"),
    ],
)
def test_what_is_no_json_object_is_one_sentence_with_the_files_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(CheckpointFormatError, match=re.escape(message)) as caught:
        read_json(file)
    assert time.perf_counter() - start < 1
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < len(str(file)) + 250


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as writable:
        writable.write(b"{")
        writable.truncate(2**40)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointFormatError, match="has 1099511627776 bytes, and JSON is read up to 268435456"):
        read_json(file)


def test_what_cannot_be_read_is_named_and_nothing_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "pipe", tmp_path / "device"):
        with pytest.raises(CheckpointPathError, match=f"cannot read {path}"):
            read_json(path)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, None, True], "a": {"name": "日本語 ▁ \U0001f999"}, "eps": 1e-05, "most": 10**30, "less": -7}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert "日本語" in (tmp_path / "a.json").read_text(encoding="utf-8")
    bom = tmp_path / "bom.json"
    bom.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert read_json(bom) == data


def test_json_in_any_spelling_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'\n {"a": 1, "a": 2, "\\u65e5": "\\ud83e\\udd99", "\\\\ud800": {}}\r\n')
    assert read_json(file) == {"a": 2, "日": "\U0001f999", "\\ud800": {}}


@pytest.mark.parametrize("before", range(0, 60, 7))
def test_a_number_too_large_for_a_float_is_found_wherever_it_stands(before: int) -> None:
    assert decode_json(" " * before + f"[{10**308}, -0, 0.5]") == [10**308, 0, 0.5]
    with pytest.raises(ValueError, match="holds a number of 309 digits"):
        decode_json(" " * before + "[" + "9" * 309 + "]")


def test_minus_zero_keeps_its_sign() -> None:
    assert str(decode_json("[-0]")) == "[-0.0]"


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_the_deepest_json_that_is_read(opening: str) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    assert decode_json(opening * 127 + "1" + closing * 127)
    with pytest.raises(ValueError, match="is nested too deeply"):
        decode_json(opening * 128 + "1" + closing * 128)


def test_names_that_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds the name 'a' twice"):
        decode_json('{"b": {"a": 1, "c": 2, "a": 1}}', unique_names=True)
    assert decode_json('{"b": {"a": 1}, "a": 1}', unique_names=True) == {"b": {"a": 1}, "a": 1}


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
from llama_mini.checkpoint.io.files import new_directory
from llama_mini.checkpoint.io.lock import one_writer
target = Path(sys.argv[1])
with one_writer(target), new_directory(target) as directory:
    (directory / "half").write_text("of it")
    print("ready", flush=True)
    sys.stdin.read()
"""
    target = tmp_path / "model"
    command = [sys.executable, "-c", script, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.kill()
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


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="model"), new_directory(tmp_path / "file" / "model"):
        raise AssertionError("there is no folder to fill")


def test_a_directory_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model"):
        pass
    (tmp_path / "other").mkdir()
    assert stat.S_IMODE(os.stat(tmp_path / "model").st_mode) == stat.S_IMODE(os.stat(tmp_path / "other").st_mode)
