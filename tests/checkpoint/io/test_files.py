"""Reading JSON: a fault is one sentence that names the file, at once."""

import os
import re
import time
from pathlib import Path

import pytest

from llama_mini.checkpoint.io.files import decode_json, read_json, write_json
from llama_mini.errors import CheckpointFormatError, CheckpointPathError

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
        (b'{"a": "\xff"}', "is not UTF-8 text: invalid start byte at byte 7; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 or UTF-32 text: save it as UTF-8"),
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
        (b'{"eps": NaN}', "holds NaN, which is not a number in JSON"),
        (b'{"eps": [1, -Infinity]}', "holds -Infinity, which is not a number in JSON"),
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
    with pytest.raises(CheckpointFormatError, match="has 1099511627776 bytes, but 268435456 are read at most"):
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


def test_a_whole_number_must_be_finite_as_a_float() -> None:
    assert decode_json(f"[{10**308}, {-(10**308)}, 0.5]") == [10**308, -(10**308), 0.5]
    with pytest.raises(ValueError, match="holds a number of 309 digits"):
        decode_json("[" + "9" * 309 + "]")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_the_deepest_json_that_is_read(opening: str) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    assert decode_json(opening * 127 + "1" + closing * 127)
    with pytest.raises(ValueError, match="is nested too deeply"):
        decode_json(opening * 128 + "1" + closing * 128)
