"""What this machine has: number formats, devices, cores, memory. A dtype or device may be a string or torch's own."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from math import ceil
from pathlib import Path, PurePosixPath

import psutil
import torch

from llama_mini.errors import RequestError
from llama_mini.validate import check_whole

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
MAX_THREADS = 1024  # with tens of thousands, OpenMP ends the process
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_OTHER_NAMES = {  # of llama.cpp, safetensors, NumPy and PyTorch
    **dict.fromkeys(["fp32", "f32", "float"], "float32"),
    **dict.fromkeys(["fp16", "f16", "half"], "float16"),
    **dict.fromkeys(["fp64", "f64", "double"], "float64"),
    "bf16": "bfloat16",
}


def as_dtype(dtype: torch.dtype | str, device: torch.device | str = "cpu", kernels: bool = False) -> torch.dtype:
    """`auto` is bfloat16 where it is fast, else float32. Raises RequestError if unknown.

    It is fast where the processor or GPU computes in it, and on any processor with `kernels`, the operators of
    optimize/: they read half of the bytes, and compute in float32 where they must.
    """
    name = dtype_name(dtype).lower()
    if name == "auto":
        device = torch.device(device)
        fast = (kernels and device.type == "cpu") or _has_bfloat16(device)
        return torch.bfloat16 if fast else torch.float32
    name = _OTHER_NAMES.get(name, name)
    if name not in DTYPES:
        raise RequestError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def as_device(device: torch.device | str) -> torch.device:
    """The device, after a check that PyTorch can use it here. Raises RequestError."""
    try:
        device = torch.device(device.lower() if isinstance(device, str) else device)
    except RuntimeError:
        raise RequestError(f"unknown device {device!r}: give cpu, cuda, or cuda:1 for the second GPU") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise RequestError("device 'meta' cannot be used: it stores no values")
    return device


def dtype_name(dtype: torch.dtype | str) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def set_threads(threads: int | None = None) -> int:
    """Sets PyTorch's threads for the whole process. Returns their number.

    None keeps what OMP_NUM_THREADS, MKL_NUM_THREADS or torch.set_num_threads has set, and else takes the usable cores.
    Raises RequestError for a number below 1 or above MAX_THREADS.
    """
    now = torch.get_num_threads()
    if threads is not None:
        check_whole("threads", threads, RequestError, maximum=MAX_THREADS)
    elif _was_set(now):
        return now
    n = usable_cores() if threads is None else threads
    if n != now:
        torch.set_num_threads(n)
    return n


def _was_set(threads: int) -> bool:
    """Whether someone chose PyTorch's number of threads: else it is one of the machine's own numbers."""
    if os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"):
        return True
    allowed, physical = _allowed_cores(), _physical_cores()
    return threads not in (allowed, physical, min(allowed, physical), os.cpu_count())


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs PyTorch's operators in this thread alone. Those over a vocabulary gain little from others, and where other
    processes use the cores, each of them waits for the others. torch.set_num_threads is slow and for the whole process.
    """
    set_number = getattr(_openmp(), "omp_set_num_threads", lambda n: None)
    before = torch.get_num_threads()
    set_number(1)
    try:
        yield
    finally:
        set_number(before)


@cache
def _openmp() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)  # it finds the functions of the libraries that this one needs, too


def _end_openmp_threads() -> None:
    """Before a fork. OpenMP's threads would not exist in the child, which would wait for them forever at the next
    parallel operator. Where there are none, OpenMP starts new ones, in the parent and in the child.
    """
    if end := getattr(_openmp(), "omp_pause_resource_all", None):
        end(1)  # omp_pause_soft: settings are kept


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_openmp_threads)


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Physical cores that the process may use, within its affinity and the quotas of its control groups.

    With more threads than cores, the threads would wait for each other at every operator.
    """
    return max(1, min([_allowed_cores(), _physical_cores(), *_core_quotas(proc, cgroups)]))


def _allowed_cores() -> int:
    """Logical cores of the process's affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical_cores() -> int:
    """Of the machine; where it does not say, the logical cores of the process."""
    with suppress(OSError):  # no /proc
        return psutil.cpu_count(logical=False) or _allowed_cores()
    return _allowed_cores()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pauses the garbage collector while many long-lived objects are made: it would scan all of torch for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def available_memory(device: torch.device, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that can be allocated now without swapping or being killed; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = [*_free_memory(), *_free_in_control_groups(proc, cgroups)]
    return max(0, min(limits)) if limits else None


def _free_memory() -> Iterator[int]:
    """Free bytes of the machine, and of address space below the soft limit of `ulimit -v`, if there is one."""
    with suppress(OSError):  # no /proc
        yield psutil.virtual_memory().available
    with suppress(OSError, psutil.Error, AttributeError):  # the last: a system without this limit
        process = psutil.Process()
        soft, _ = process.rlimit(psutil.RLIMIT_AS)
        if soft != psutil.RLIM_INFINITY:
            yield soft - process.memory_info().vms


def _free_in_control_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Free bytes of each control group above this process. A full one kills it, whatever the others have."""
    for group, version in _control_groups("memory", proc, cgroups):
        limit, usage = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
        try:
            free = int(_text(group / f"memory.{limit}")) - int(_text(group / f"memory.{usage}"))
        except ValueError:  # no limit: `max`, or no such file
            continue
        stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines())
        prefix = "" if version == 2 else "total_"
        pages = (f"{prefix}inactive_file", f"{prefix}active_file")  # the file cache, which the kernel can free
        yield free + sum(int(stat.get(name, 0)) for name in pages)


def _core_quotas(proc: Path, cgroups: Path) -> Iterator[int]:
    """How many cores each control group above this process may use."""
    for group, version in _control_groups("cpu", proc, cgroups):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            quota, period = map(int, " ".join(_text(group / name) for name in names).split())
        except ValueError:  # no limit: `max`, or no such file
            continue
        if quota > 0 and period > 0:  # version 1 writes -1 for no limit
            yield ceil(quota / period)


def _control_groups(controller: str, proc: Path, cgroups: Path) -> Iterator[tuple[Path, int]]:
    """The folders of this process's control groups, up to the root, each with its cgroup version, 1 or 2."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mounts = [cgroups, cgroups / "unified"]
        if controllers:
            mounts = [cgroups / controller] if controller in controllers.split(",") else []
        parts = PurePosixPath(path).parts[1:]
        if ".." in parts:  # a group outside this namespace: only the mount itself is visible
            parts = ()
        for mount in mounts:
            for depth in range(len(parts), -1, -1):  # in a container the path may be the host's: only the mount exists
                yield mount.joinpath(*parts[:depth]), 1 if controllers else 2


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def user_cache() -> Path:
    """The folder for files that can be regenerated: built operators, converted checkpoints. It may not exist yet."""
    return user_folder("XDG_CACHE_HOME", ".cache")


def user_folder(variable: str, default: str) -> Path:
    """This project's folder in the directory that an XDG variable names. XDG says to ignore a relative path there.

    Without a home directory (a container's user that /etc/passwd lacks) it is in the temporary directory.
    """
    folder = Path(os.environ.get(variable, ""))
    if folder.is_absolute():
        return folder / "llama_mini"
    try:
        home = Path.home()
    except RuntimeError:
        return temporary_folder()
    return home / default / "llama_mini" if home.is_absolute() else temporary_folder()


def temporary_folder() -> Path:
    """This user's folder in the temporary directory. Unlike tempfile's, that is never the working directory, which may
    be a checkpoint's.
    """
    folder = Path(os.environ.get("TMPDIR", ""))
    user = os.getuid() if hasattr(os, "getuid") else ""
    return (folder if folder.is_absolute() and folder.is_dir() else Path("/tmp")) / f"llama_mini-{user}"


def peak_memory_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_bytes(n_bytes: int) -> str:
    """A size to print, in MiB or GiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
