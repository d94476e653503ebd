"""The kernels under the compiler's sanitizers, in memory of the exact size.

Sanitizers do not see what AMX loads and stores: for that, inaccessible pages begin where the memory ends.
"""

import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import llama_mini.optimize
from llama_mini.optimize.build import ISA_VARIANTS, load_kernels

NATIVE = Path(llama_mini.optimize.__file__).parent / "native"
DRIVER = Path(__file__).parent / "native" / "driver.cpp"
CASES = [("address,undefined", isa) for isa in ISA_VARIANTS]
CASES += [("guard", "amx"), *(("thread", isa) for isa in ISA_VARIANTS)]
GUARD = ["-DGUARDED", "-Wl,--wrap=aligned_alloc,--wrap=free"]
Driver = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """Runs the driver of an ISA variant with a sanitizer; each is compiled once."""

    @cache
    def program(sanitizer: str, isa: str) -> Path:
        path = tmp_path_factory.mktemp("sanitizers") / "driver"
        words = ["g++", "-O1", "-g", "-std=c++20", "-fno-math-errno", "-w"]
        words += GUARD if sanitizer == "guard" else [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        words += [f"-DISA={isa}", *ISA_VARIANTS[isa], f"-I{NATIVE}"]
        words += [str(DRIVER), str(NATIVE / "kernels.cpp"), "-pthread", "-o", str(path)]
        subprocess.run(words, check=True, timeout=300)
        return path

    def run(sanitizer: str, isa: str, *plant: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program(sanitizer, isa), *plant], capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.parametrize(("sanitizer", "isa"), CASES)
def test_no_isa_variant_is_caught(driver: Driver, sanitizer: str, isa: str) -> None:
    assert load_kernels()
    if isa not in torch.ops.llama_mini.isa_variants():
        pytest.skip(f"this processor has no {isa}")
    done = driver(sanitizer, isa)
    assert (done.returncode, done.stdout, done.stderr[:2000]) == (0, "416 cases\n", "")


@pytest.mark.parametrize(
    ("sanitizer", "plant", "report"),
    [
        ("address,undefined", "read", "heap-buffer-overflow"),
        ("thread", "race", "data race"),
        ("guard", "read", ""),
    ],
)
def test_what_is_planted_is_caught(driver: Driver, sanitizer: str, plant: str, report: str) -> None:
    done = driver(sanitizer, "avx2", plant)
    assert done.returncode != 0
    assert report in done.stderr
