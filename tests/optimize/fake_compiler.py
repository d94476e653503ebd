"""A script in place of the compiler: it logs its arguments and ends at once."""

import stat
from pathlib import Path

FAKE = """#!/bin/sh
{first}
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
echo whole > "$2"
"""


def fake_compiler(path: Path, log: Path, first: str = "") -> Path:
    path.write_text(FAKE.format(log=log, first=first))
    path.chmod(0o700)
    return path


def links(log: Path) -> int:
    return sum("-shared" in line for line in log.read_text().splitlines())


def is_whole(library: Path) -> bool:
    """Whether all that the script wrote is there; a hash of it follows."""
    return library.read_bytes().startswith(b"whole\n")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
