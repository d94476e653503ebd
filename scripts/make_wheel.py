"""Makes a wheel that carries the fast operators, built for this platform and this version of torch.

    python scripts/make_wheel.py [FOLDER]     # default: dist

Where it is installed beside the same version of torch, nothing is compiled, and no compiler is needed. Elsewhere the
operators are built on first use, as ever. It works on Linux whose C library is as new as this one's.
"""

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
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "dist")
    with TemporaryDirectory() as folder:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        prebuilt = Path(folder, "llama_mini", "optimize", PREBUILT)
        prebuilt.mkdir()
        shutil.copy(built(), prebuilt)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        tag = f"--config-settings=--build-option=--plat-name={platform}"
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={target}", tag, folder]
        subprocess.run(command, check=True)
    print(*target.glob("llama_mini-*.whl"), sep="\n")


if __name__ == "__main__":
    main()
