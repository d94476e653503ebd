"""How many threads run: what the process may use, or what is asked for."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from llama_mini import LLM
from llama_mini.errors import RequestError
from llama_mini.machine import usable_cores
from llama_mini.optimize import set_threads


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 logical processors on 16 cores, of which the process may run on 24."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 32 if logical else 16)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)


def in_a_group(folder: Path, quota: str | None, line: str = "0::/app\n") -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup in which this process is in the group /app, of this quota."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True, exist_ok=True)
    (proc / "self" / "cgroup").write_text(line)
    (cgroups / "app").mkdir(parents=True, exist_ok=True)
    if quota is not None:
        (cgroups / "app" / "cpu.max").write_text(quota)
    return proc, cgroups


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 16),
        ("400000 100000\n", 4),
        ("250000 100000\n", 3),
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("9900000 100000\n", 16),
        ("20000 10000", 2),
        ("", 16),
        ("nonsense", 16),
        (None, 16),
    ],
)
def test_a_control_groups_quota_bounds_the_cores(tmp_path: Path, quota: str | None, cores: int) -> None:
    assert usable_cores(*in_a_group(tmp_path, quota)) == cores


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("250000", 3), ("", 16)])
def test_version_1_has_its_quota_in_two_files(tmp_path: Path, quota: str, cores: int) -> None:
    folders = in_a_group(tmp_path, None, line="4:cpu,cpuacct:/app\n0::/\n")
    group = folders[1] / "cpu" / "app"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(quota)
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(*folders) == cores


@pytest.mark.usefixtures("machine")
def test_a_group_above_bounds_the_cores_too(tmp_path: Path) -> None:
    folders = in_a_group(tmp_path, "800000 100000")
    (folders[1] / "cpu.max").write_text("200000 100000")
    assert usable_cores(*folders) == 2


@pytest.mark.usefixtures("machine")
def test_affinity_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert usable_cores(*in_a_group(tmp_path, None)) == 3
    assert usable_cores(*in_a_group(tmp_path, "200000 100000")) == 2


@pytest.mark.usefixtures("machine")
def test_systems_that_say_less_are_asked_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(*in_a_group(tmp_path, None)) == 16
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert usable_cores(*in_a_group(tmp_path, None)) == 32


def test_threads_are_set_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mini.machine.usable_cores", lambda: 3)
    assert set_threads() == torch.get_num_threads() == 3
    assert set_threads(2) == torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_a_number_that_is_none_is_named(threads: object) -> None:
    with pytest.raises(RequestError, match=r"^threads must be a whole number of at least 1, not "):
        set_threads(threads)  # type: ignore[arg-type]


def test_the_engine_takes_what_it_is_given(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mini.machine.usable_cores", lambda: 4)
    LLM(tiny_dir, threads=2)
    assert torch.get_num_threads() == 2
    LLM(tiny_dir)
    assert torch.get_num_threads() == 4
