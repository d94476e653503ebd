"""The lock beside a target: leftovers go, a folder that cannot be written is one sentence."""

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from llama_mini.checkpoint.io.atomic import partial_prefix
from llama_mini.checkpoint.io.lock import one_writer
from llama_mini.errors import CheckpointPathError

NOBODY = 65534


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process cannot write, root or not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_one_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    other = FileLock(target.parent / ".target.lock")
    with one_writer(target), pytest.raises(Timeout):
        other.acquire(timeout=0)
    other.acquire(timeout=0)
    other.release()


def test_the_lock_goes_with_the_last_writer(tmp_path: Path) -> None:
    target, waits, go_on = tmp_path / "target", threading.Event(), threading.Event()

    def second() -> None:
        with one_writer(target):
            waits.set()
            go_on.wait(10)

    thread = threading.Thread(target=second, daemon=True)
    with one_writer(target):
        thread.start()
        assert not waits.wait(0.2)
    assert waits.wait(10)
    with pytest.raises(Timeout):  # a third one, which comes after the first one's lock has gone
        FileLock(tmp_path / ".target.lock").acquire(timeout=0)
    go_on.set()
    thread.join(10)
    with pytest.raises(ValueError, match="refused"), one_writer(target):
        raise ValueError("refused")
    assert not any(tmp_path.iterdir())


def test_leftovers_of_this_target_alone_are_cleared(tmp_path: Path) -> None:
    target = tmp_path / "target"
    left, of_another = tmp_path / f"{partial_prefix(target)}abc", tmp_path / f"{partial_prefix(tmp_path / 'other')}abc"
    for folder in (left, of_another):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    with one_writer(target):
        assert not left.exists()
        assert of_another.exists()


def test_the_lock_is_given_back_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), one_writer(tmp_path / "target"):
        raise KeyboardInterrupt
    FileLock(tmp_path / ".target.lock").acquire(timeout=0)


def test_a_read_only_folder_is_one_sentence(read_only: Path) -> None:
    for target in (read_only / "target", read_only / "new" / "target"):
        with (
            pytest.raises(CheckpointPathError, match=f"cannot write in {target.parent}: Permission denied"),
            one_writer(target),
        ):
            pass


def test_a_file_where_a_folder_belongs_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointPathError, match=f"cannot write in {tmp_path}/file"), one_writer(tmp_path / "file/x"):
        pass
