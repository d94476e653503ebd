"""What the machine, its control groups and limits leave: fake trees of /proc and /sys/fs/cgroup, and this machine."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from llama_mini import Llama
from llama_mini.errors import RequestError
from llama_mini.machine import as_device, as_dtype, available_memory, usable_cores, user_cache

CPU = torch.device("cpu")
MiB, GiB = 2**20, 2**30


class Machine:
    """A fake /proc and /sys/fs/cgroup, on a machine with 64 GiB available."""

    def __init__(self, root: Path, lines: str) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(lines)

    def group(self, path: str, **files: object) -> "Machine":
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            text = "".join(f"{k} {v}\n" for k, v in value.items()) if isinstance(value, dict) else f"{value}\n"
            (folder / f"memory.{name}").write_text(text)
        return self

    def available(self) -> int | None:
        return available_memory(CPU, self.proc, self.cgroups)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Machine]:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GiB))
    return lambda lines: Machine(tmp_path, lines)


CACHE = {"anon": 7, "inactive_file": 2 * GiB, "active_file": 1 * GiB, "slab": 5}


def test_without_control_groups_it_is_what_the_machine_has(machine: Callable[[str], Machine]) -> None:
    assert machine("").available() == 64 * GiB


def test_version_2_gives_back_its_page_cache(machine: Callable[[str], Machine]) -> None:
    a = machine("0::/user/app\n").group("user/app", max=16 * GiB, current=6 * GiB, stat=CACHE)
    assert a.available() == 13 * GiB


@pytest.mark.parametrize("tight", ["", "user", "user/app"])
def test_the_tightest_group_on_the_path_decides(machine: Callable[[str], Machine], tight: str) -> None:
    a = machine("0::/user/app\n")
    for path in ("", "user", "user/app"):
        a.group(path, max=(8 if path == tight else 20) * GiB, current=GiB, stat=CACHE)
    assert a.available() == 10 * GiB


def test_a_neighbour_does_not_count(machine: Callable[[str], Machine]) -> None:
    a = machine("0::/user/app\n").group("user/app", max="max", current=GiB, stat=CACHE)
    assert a.group("user/other", max=GiB, current=0, stat={}).available() == 64 * GiB


@pytest.mark.parametrize("line", ["0::/\n", "0::/docker/0123abc\n", "0::/../../elsewhere\n"])
def test_a_container_sees_its_own_group_at_the_root(machine: Callable[[str], Machine], line: str) -> None:
    assert machine(line).group("", max=4 * GiB, current=GiB, stat={"inactive_file": 5}).available() == 3 * GiB + 5


def test_a_group_outside_of_the_namespace_is_not_looked_for(machine: Callable[[str], Machine]) -> None:
    a = machine("0::/../elsewhere\n").group("", max=4 * GiB, current=GiB, stat={})
    assert a.group("../elsewhere", max=GiB, current=0, stat={}).available() == 3 * GiB


@pytest.mark.parametrize("path", ["docker/0123abc", ""])
def test_version_1_counts_its_totals(machine: Callable[[str], Machine], path: str) -> None:
    a = machine("5:cpu,cpuacct:/elsewhere\n4:hugetlb,memory:/docker/0123abc\n0::/\n")
    stat = {"inactive_file": 7, "total_inactive_file": 2 * GiB, "total_active_file": GiB}
    a.group(f"memory/{path}", limit_in_bytes=16 * GiB, usage_in_bytes=6 * GiB, stat=stat)
    a.group("memory", **({"limit_in_bytes": 2**63 - 4096, "usage_in_bytes": 20 * GiB} if path else {}))
    assert a.available() == 13 * GiB


def test_a_group_that_is_over_its_limit_leaves_nothing(machine: Callable[[str], Machine]) -> None:
    assert machine("0::/a\n").group("a", max=GiB, current=2 * GiB, stat={}).available() == 0


def test_a_group_that_the_machine_cannot_fill_does_not_count(machine: Callable[[str], Machine]) -> None:
    assert machine("0::/a\n").group("a", max=900 * GiB, current=0, stat={}).available() == 64 * GiB


def test_a_limit_counts_without_statistics(machine: Callable[[str], Machine]) -> None:
    assert machine("0::/a\n").group("a", max=4 * GiB, current=GiB).available() == 3 * GiB


@pytest.mark.parametrize("text", ["max", "", "nonsense"])
def test_what_is_no_limit_is_passed_over(machine: Callable[[str], Machine], text: str) -> None:
    assert machine("0::/a\n").group("a", max=text, current=GiB, stat=CACHE).available() == 64 * GiB


def test_none_where_nobody_says(machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(psutil, "virtual_memory", absent)
    assert machine("").available() is None
    assert available_memory(torch.device("meta")) is None


def test_the_gpu_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {torch.device("cuda", 0): 5 * GiB, torch.device("cuda", 1): 7 * GiB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 * GiB))
    assert available_memory(torch.device("cuda", 1)) == 7 * GiB


def test_without_proc_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a chroot: psutil finds neither files nor this process."""

    def absent(*args: object, **options: object) -> None:
        raise FileNotFoundError

    def no_process(pid: int | None = None) -> None:
        raise psutil.NoSuchProcess(pid or 0)

    monkeypatch.setattr(psutil, "virtual_memory", absent)
    monkeypatch.setattr(psutil, "cpu_count", absent)
    monkeypatch.setattr(psutil, "Process", no_process)
    assert available_memory(CPU, tmp_path, tmp_path) is None
    assert usable_cores(tmp_path, tmp_path) >= 1


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/llama_mini"),
        ({"XDG_CACHE_HOME": "x", "HOME": "/h"}, "/h/.cache/llama_mini"),
        ({"HOME": "/h"}, "/h/.cache/llama_mini"),
        ({"HOME": "h"}, "/tmp/llama_mini-12345"),
        ({}, "/tmp/llama_mini-12345"),
        ({"TMPDIR": "{tmp_path}"}, "{tmp_path}/llama_mini-12345"),
        ({"TMPDIR": "/nonexistent"}, "/tmp/llama_mini-12345"),
        ({"TMPDIR": "."}, "/tmp/llama_mini-12345"),
    ],
)
def test_the_cache_folder_of_a_user_without_a_home_is_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    for name in ("XDG_CACHE_HOME", "HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path=tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # /etc/passwd does not have it
    assert user_cache() == Path(folder.format(tmp_path=tmp_path))


def test_this_machine_says_something_plausible() -> None:
    there = available_memory(CPU)
    assert there is not None
    assert 10 * MiB < there <= psutil.virtual_memory().total


def test_a_limit_on_the_address_space_counts() -> None:
    """In a child, under a soft limit that leaves it 300 MiB: what is said can be taken, and not twice of it."""
    child = (
        "import psutil, resource, torch\n"
        "from llama_mini.machine import available_memory\n"
        "used = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))\n"
        "there = available_memory(torch.device('cpu'))\n"
        "bytearray(int(0.95 * there))\n"
        "try:\n"
        "    bytearray(2 * there)\n"
        "except MemoryError:\n"
        "    print(there)\n"
    )
    out = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout
    assert 250 * MiB < int(out) <= 300 * MiB
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_by_any_name_and_a_device_in_any_case(tiny_dir: Path, dtype: torch.dtype) -> None:
    names = {
        torch.float32: ["float32", "FP32", "f32", "float"],
        torch.float16: ["torch.float16", "fp16", "F16", "half"],
        torch.bfloat16: ["bfloat16", "BF16", "bf16", "torch.bfloat16"],
        torch.float64: ["float64", "F64", "fp64", "double"],
    }
    assert {as_dtype(name) for name in names[dtype]} == {dtype}
    assert as_dtype("AUTO") == as_dtype("auto")
    assert as_dtype("auto", CPU, kernels=True) == torch.bfloat16
    assert as_dtype("auto", "meta", kernels=True) == torch.float32
    assert Llama.from_pretrained(tiny_dir, names[dtype][1], "CPU").dtype == dtype
    assert as_device("CPU") == CPU
    for name in ("gpu", "cuda:x", ""):
        with pytest.raises(RequestError, match=f"^unknown device '{name}': give cpu, cuda, or cuda:1"):
            as_device(name)
    for name in ("float8", "int8", ""):
        with pytest.raises(RequestError, match=f"unknown dtype '{name}'; known: auto, float32, bfloat16"):
            as_dtype(name)
