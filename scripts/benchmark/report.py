"""What a run says: every series, the ratios against what the engine must reach, and one line of JSON."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmark.engines import OURS
from benchmark.measures import STREAM
from benchmark.rounds import Watch

UNITS = {
    "decode": "tok/s",
    "prefill": "tok/s",
    "batch": "tok/s",
    "context": "tok/s",
    "read": "GB/s",
    "bandwidth": "of it",
    "start": "s",
    "load": "s",
    "memory": "MiB",
    "peak": "×",
    "quality": "nats",
}
PACKAGES = ("torch", "transformers", "llama-cpp-python", "openvino-genai", "ctranslate2")


@dataclass(frozen=True)
class Target:
    """A series, or its ratio to `under` round by round, whose median must reach `bound`; or must not pass it."""

    over: str
    under: str | None
    bound: float
    at_most: bool = False


@dataclass(frozen=True)
class Verdict:
    """A target that this run could judge. `short`: how far the median stays from the bound, as a share of it."""

    over: str
    under: str | None
    median: float
    least: float
    most: float
    bound: float
    at_most: bool
    met: bool
    short: float


def targets() -> Iterator[Target]:
    against: dict[tuple[str, str], dict[str, float]] = {
        ("decode", "llama.cpp"): {"float32": 1.03, "bfloat16": 1.3, "int8": 1.8, "int4": 2.0},
        ("decode", "transformers"): {"float32": 1.4, "bfloat16": 3.0},
        ("prefill", "llama.cpp"): {"bfloat16": 6.0, "int8": 5.5, "int4": 4.5},
        ("prefill", "OpenVINO"): {"int8": 1.2, "int4": 1.2},
    }
    for (measure, peer), bounds in against.items():
        for name, bound in bounds.items():
            for ours in (OURS, STREAM):
                yield Target(f"{measure} {name} {ours}", f"{measure} {name} {peer}", bound)
    for name, share in {"bfloat16": 0.9, "int8": 0.88, "int4": 0.8}.items():
        yield Target(f"bandwidth {name}", None, share)
    for name, share in {"bfloat16": 0.9, "int8": 0.85, "int4": 0.8}.items():
        yield Target(f"context {name} at 4096", f"context {name} at 64", share)
    for context, times in {64: 7.0, 512: 5.0}.items():
        yield Target(f"batch bfloat16 16 rows at {context}", f"batch bfloat16 1 row at {context}", times)
    yield Target(f"start {OURS}", "start transformers", 0.42, at_most=True)
    for name in ("float32", "bfloat16", "int8", "int4"):
        yield Target(f"load {name} {OURS}", f"load {name} file read", 2.0, at_most=True)
        yield Target(f"peak over floor by weights {name}", None, 1.4, at_most=True)
    for name, nats in {"int8": 0.002, "int4": 0.005}.items():
        yield Target(f"quality {name} over bfloat16, mean", None, nats, at_most=True)


def verdicts(series: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """Of the targets whose series are there."""
    found = []
    for target in targets():
        if target.over not in series or (target.under is not None and target.under not in series):
            continue
        values = list(series[target.over])
        if target.under is not None:
            values = [over / under for over, under in zip(values, series[target.under], strict=True)]
        median = statistics.median(values)
        gap = (median - target.bound) * (1 if target.at_most else -1)
        short = max(0.0, gap) / target.bound
        found.append(
            Verdict(median=median, least=min(values), most=max(values), met=gap <= 0, short=short, **asdict(target))
        )
    return found


def table(series: Mapping[str, Sequence[float]]) -> str:
    """A line a series: median, least and most."""
    width = max(map(len, series), default=0)
    lines = [f"{'':{width}}  {'median':>9} {'min':>9} {'max':>9}"]
    for name, values in series.items():
        numbers = " ".join(f"{_shown(f(values)):>9}" for f in (statistics.median, min, max))
        lines.append(f"{name:{width}}  {numbers} {UNITS[name.split()[0]]}")
    return "\n".join(lines)


def judged(found: Sequence[Verdict]) -> str:
    """A line a target: the median of the rounds' ratios, least and most, the bound, and by how much it is missed."""
    names = [v.over if v.under is None else f"{v.over} / {v.under}" for v in found]
    width = max(map(len, names), default=0)
    lines = []
    for name, v in zip(names, found, strict=True):
        said = "met" if v.met else f"missed by {100 * v.short:.0f} %"
        spread = f"{_shown(v.median):>8} ({_shown(v.least)} to {_shown(v.most)})"
        lines.append(f"{name:{width}}  {spread:32} {'at most' if v.at_most else 'at least'} {v.bound:g}: {said}")
    return "\n".join(lines)


def conditions(threads: int, repeats: int, watch: Watch, root: Path) -> dict[str, Any]:
    """Machine, versions and commit; rounds, how many were taken again and how many stayed disturbed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": _commit(root),
        "repeats": repeats,
        "rounds": watch.runs,
        "rounds_taken_again": watch.again,
        "rounds_disturbed": watch.kept,
    }


def as_json(about: Mapping[str, Any], series: Mapping[str, Sequence[float]], found: Sequence[Verdict]) -> str:
    units = {name: UNITS[name.split()[0]] for name in series}
    parts = {name: {"unit": units[name], "values": list(values)} for name, values in series.items()}
    return json.dumps({**about, "series": parts, "targets": [asdict(verdict) for verdict in found]})


def _shown(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3g}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """With a `+` where files differ from it; None outside of a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
