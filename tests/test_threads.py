"""How many threads run: what is asked for, what the user set, or what the process may use."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llama_mini import LLM, SamplingParams
from llama_mini.engine import runner
from llama_mini.engine.request import Request
from llama_mini.errors import RequestError
from llama_mini.machine import _was_set, one_thread, usable_cores
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
@pytest.mark.parametrize("mounted", ["", "docker/0123abc", "docker"])
def test_version_1_counts_groups_above_and_a_containers_own(tmp_path: Path, mounted: str) -> None:
    """In a container /proc names the host's path, and only the mount exists."""
    folders = in_a_group(tmp_path, None, line="3:cpuacct,cpu:/docker/0123abc\n")
    group = folders[1] / "cpu" / mounted
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("150000")
    (group / "cpu.cfs_period_us").write_text("50000")
    assert usable_cores(*folders) == 3


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("line", ["0::/\n", "0::/kubepods/pod1/abc\n", "0::/../other\n", ""])
def test_version_2_in_a_container(tmp_path: Path, line: str) -> None:
    folders = in_a_group(tmp_path, None, line=line)
    (folders[1] / "cpu.max").write_text("150000 100000")
    assert usable_cores(*folders) == (2 if line else 16)


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


def test_the_usable_cores_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mini.machine.usable_cores", lambda: 3)
    monkeypatch.setattr("llama_mini.machine._was_set", lambda threads: False)
    assert set_threads() == torch.get_num_threads() == 3
    assert set_threads(2) == torch.get_num_threads() == 2


@pytest.mark.usefixtures("machine")
def test_a_number_that_is_not_the_machines_own_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert [n for n in range(1, 40) if not _was_set(n)] == [16, 24, 32]
    monkeypatch.setenv("MKL_NUM_THREADS", "16")
    assert _was_set(16)


PROCESS = """
import torch
{first}
from llama_mini.optimize import set_threads
print(set_threads(), set_threads(5), torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("name", "first"),
    [("OMP_NUM_THREADS", ""), pytest.param("UNUSED", "torch.set_num_threads(1)", marks=pytest.mark.slow)],
)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one is the default there")
def test_what_the_user_set_is_kept_unless_threads_are_asked_for(name: str, first: str) -> None:
    """In a process, since OpenMP reads its variables once."""
    clean = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-c", PROCESS.format(first=first)]
    done = subprocess.run(command, env=clean | {name: "1"}, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "1 5 5\n"


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 1025, 10**30])
def test_a_number_that_is_none_is_named(threads: object) -> None:
    with pytest.raises(RequestError, match=r"^threads must be a whole number from 1 to 1024, not "):
        set_threads(threads)  # type: ignore[arg-type]


def test_operators_in_one_thread() -> None:
    """And the number is as before afterwards, also after an error."""
    torch.set_num_threads(2)
    with suppress(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "params", [SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, temperature=1.0, seed=1)]
)
def test_a_token_is_sampled_in_one_thread(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    """On a busy machine every operator over the vocabulary would wait for the second thread."""
    llm, seen, append = LLM(tiny_dir, threads=2), [], Request.append_token

    def watched(*args: Any) -> None:
        seen.append(torch.get_num_threads())
        append(*args)

    monkeypatch.setattr(Request, "append_token", watched)
    llm.generate("Hello", params)
    assert (seen, torch.get_num_threads()) == ([1, 1], 2)


def test_a_number_that_is_set_between_two_calls_holds(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps one for each thread, and the engine has a thread of its own."""
    llm, seen, tokens = LLM(tiny_dir, threads=2), set(), runner.PagedTokens

    def watched(*args: Any) -> runner.PagedTokens:
        seen.add(torch.get_num_threads())
        return tokens(*args)

    monkeypatch.setattr(runner, "PagedTokens", watched)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        llm.generate("Hello", max_tokens=2)
        assert (seen, torch.get_num_threads()) == ({threads}, threads)
        seen.clear()


def test_the_engine_takes_what_it_is_given(tiny_dir: Path) -> None:
    LLM(tiny_dir, threads=2)
    assert torch.get_num_threads() == 2
