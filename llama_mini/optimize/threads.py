"""As many threads as the process may use cores: more would wait for one another at every operator."""

import os
from math import ceil
from pathlib import Path

import psutil
import torch

from llama_mini.errors import RequestError
from llama_mini.validate import is_whole, shown


def set_threads(threads: int | None = None) -> int:
    """Sets PyTorch's threads for the whole process, None to the usable cores; returns their number.

    Raises RequestError for a number below 1.
    """
    if threads is not None and (not is_whole(threads) or threads < 1):
        raise RequestError(f"threads must be a whole number of at least 1, not {shown(threads)}")
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
