"""Makes a wheel that carries the fast operators, built for this platform and this version of torch.

    python scripts/make_wheel.py [FOLDER]     # default: dist
    CXX=aarch64-linux-gnu-g++ python scripts/make_wheel.py --machine aarch64     # for another processor

Where it is installed beside the same version of torch, nothing is compiled, and no compiler is needed. Elsewhere the
operators are built on first use, as ever. It works on Linux whose C library is as new as this one's.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from llama_mini.optimize.build import PREBUILT, built

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("llama_mini", "pyproject.toml", "README.md", "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a wheel that carries the fast operators.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("dist"), help="where to put it (default: dist)")
    parser.add_argument("--machine", default=platform.machine(), help="the processor; for another, CXX must be set")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        prebuilt = Path(folder, "llama_mini", "optimize", PREBUILT)
        prebuilt.mkdir()
        shutil.copy(built(machine=args.machine), prebuilt)
        name = sysconfig.get_platform().replace(platform.machine(), args.machine).replace("-", "_").replace(".", "_")
        tag = f"--config-settings=--build-option=--plat-name={name}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            f"--wheel-dir={args.folder}",
            tag,
            folder,
        ]
        subprocess.run(command, check=True)
    print(*args.folder.glob("llama_mini-*.whl"), sep="\n")


if __name__ == "__main__":
    main()
