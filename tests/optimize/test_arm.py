"""The kernels for ARM, cross-compiled and emulated by QEMU: they compute what those for AVX2 do."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llama_mini.optimize
from llama_mini.optimize.build import VARIANTS_OF

NATIVE = Path(llama_mini.optimize.__file__).parent / "native"
DRIVER = Path(__file__).parent / "native" / "driver.cpp"
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROCESSORS = {"neon": "neoverse-n1", "neon_bf16": "max"}  # the first has no bfloat16 products
IN_SIXTEEN_BITS = (8, 12, 13)  # Kind::INT8 and tables: AVX2 never rounds activations for them to eight bits
SAME_BITS = ("quantize", "pack", "repack", "dequantize_rows")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2's results are compared with"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"no {CROSS}"),
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}"),
]


def results(folder: Path, compiler: str, machine: str, isa: str, *emulator: str) -> Path:
    """A file of what the driver computes."""
    program, file = folder / isa, folder / f"{isa}.results"
    words = [compiler, "-O1", "-std=c++20", "-fno-math-errno", "-w", f"-DISA={isa}", *VARIANTS_OF[machine][isa]]
    words += [f"-I{NATIVE}", str(DRIVER), str(NATIVE / "kernels.cpp"), "-pthread", "-o", str(program)]
    subprocess.run(words, check=True, timeout=600)
    done = subprocess.run([*emulator, program, "write", file], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "104 cases\n", "")
    return file


def records(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """The names, types and bytes that the driver wrote."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        end = data.index(b"\n", at)
        name, type_, count = data[at:end].decode().split()
        at = end + 1 + int(count)
        yield name, type_, data[end + 1 : at]


def floats(data: bytes, type_: str) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32 if type_ == "f" else torch.bfloat16).float()


def far_apart(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest number; infinite if they differ in which are finite."""
    known = b.isfinite()
    if not torch.equal(known, a.isfinite()):
        return torch.inf
    return float((a - b)[known].abs().amax() / b[known].abs().amax().clamp_min(1e-20)) if known.any() else 0.0


def tolerance(isa: str, float32: bool, kind: int) -> float:
    """About twice what was measured, over two kernels in a row: attention, then the feed-forward branch."""
    if float32:
        return 3e-4
    if isa == "neon_bf16":  # weights of attention are rounded to bfloat16, and the next activations to eight bits
        return 0.1
    return 0.08 if kind in IN_SIXTEEN_BITS else 0.01


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return results(tmp_path_factory.mktemp("x86"), "g++", "x86_64", "avx2")


@pytest.mark.parametrize("isa", VARIANTS_OF["aarch64"])
def test_arm_computes_what_avx2_does(tmp_path: Path, expected: Path, isa: str) -> None:
    emulator = [QEMU, "-L", "/usr/aarch64-linux-gnu", "-cpu", PROCESSORS[isa]]
    file = results(tmp_path, CROSS, "aarch64", isa, *emulator)
    wrong, float32, kind, last = [], False, 0, torch.empty(0)
    for (name, type_, a), (of, _, b) in zip(records(file), records(expected), strict=True):
        assert (name, len(a)) == (of, len(b))
        if name == "case":
            float32, kind = bool(a[0]), a[1]
        elif name == "likeliest":  # of what gemv has just computed
            chosen = torch.frombuffer(bytearray(a), dtype=torch.int64)
            logits = last.view(len(chosen), -1)
            finite = logits.isfinite().all(-1)
            assert torch.equal(chosen >= 0, finite)
            assert torch.equal(logits.gather(1, chosen.clamp_min(0)[:, None])[finite, 0], logits.amax(-1)[finite])
        elif name in SAME_BITS:
            assert a == b, (name, kind)
        elif a:
            last = floats(a, type_)
            error = far_apart(last, floats(b, type_))
            wrong += [(name, float32, kind, error)] * (error > tolerance(isa, float32, kind))
    assert wrong == []
