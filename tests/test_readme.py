"""README keeps up with the code."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_line_counts_are_those_of_the_files() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "update_readme.py", "--check"], check=True)
