"""What this machine has: number formats, devices, cores and memory. Strings and torch's own objects work alike."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path, PurePosixPath

import psutil
import torch

from llama_mini.errors import RequestError
from llama_mini.validate import is_whole, short_repr

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def as_dtype(dtype: torch.dtype | str, device: torch.device | str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 where the processor or GPU computes in it, else float32. Raises RequestError when unknown."""
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(torch.device(device)) else torch.float32
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise RequestError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def as_device(device: torch.device | str) -> torch.device:
    """A device that can be used here. Raises RequestError."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise RequestError("device 'meta' cannot be used: it holds no numbers")
    return device


def dtype_name(dtype: torch.dtype | str) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def set_threads(threads: int | None = None) -> int:
    """Sets PyTorch's threads for the whole process, None to the usable cores; returns their number.

    Raises RequestError for a number below 1.
    """
    if threads is not None and (not is_whole(threads) or threads < 1):
        raise RequestError(f"threads must be a whole number of at least 1, not {short_repr(threads)}")
    n = usable_cores() if threads is None else threads
    if n != torch.get_num_threads():
        torch.set_num_threads(n)
    return n


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Physical cores, less those that the process's affinity or its control group withholds."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    try:
        limit, period = quota.read_text().split()
        return max(1, min(cores, ceil(int(limit) / int(period))))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return cores


@contextmanager
def gc_paused() -> Iterator[None]:
    """Keeps the garbage collector off while many objects are made that stay: it would scan all of torch for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def available_memory(
    device: torch.device, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that can be taken now without swapping or being killed; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    says = [*_machine(), *_address_space(), *_control_groups(proc, cgroups)]
    return max(0, min(says)) if says else None


def _machine() -> Iterator[int]:
    try:
        yield psutil.virtual_memory().available
    except OSError:  # no /proc
        return


def _address_space() -> Iterator[int]:
    """What the soft limit of `ulimit -v` leaves, on systems that have one."""
    if hasattr(psutil, "RLIMIT_AS"):
        process = psutil.Process()
        soft, _ = process.rlimit(psutil.RLIMIT_AS)
        if soft != psutil.RLIM_INFINITY:
            yield soft - process.memory_info().vms


def _control_groups(proc: Path, root: Path) -> Iterator[int]:
    """What each control group above this process leaves: any of them can be the one that kills it."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            for mount in (root, root / "unified"):
                for group in _upwards(mount, path):
                    yield from _left(group, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            for group in _upwards(root / "memory", path):
                yield from _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it. In a container the path may be the host's, and only `mount` is there."""
    parts = PurePosixPath(path).parts[1:]
    if ".." in parts:  # outside of what this namespace shows
        parts = ()
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _left(group: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """Nothing where the group has no limit, or has no say in memory."""
    try:
        left = int(_text(group / limit)) - int(_text(group / usage))
    except ValueError:  # `max`, or no such file
        return
    stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines())
    pages = (f"{prefix}inactive_file", f"{prefix}active_file")  # of files: given back when memory runs short
    yield left + sum(int(stat.get(name, 0)) for name in pages)


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def peak_memory_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_bytes(n_bytes: int) -> str:
    """A size for people, in MiB or GiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
