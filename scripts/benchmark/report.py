"""What a run prints: every series, the ratios of series that belong together, and one line of JSON."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmark.rounds import Watch

UNITS = {
    "decode": "tok/s",
    "prefill": "tok/s",
    "batch": "tok/s",
    "verify": "s",
    "context": "tok/s",
    "long": "tok/s",
    "files": "tok/s",
    "busy": "tok/s",
    "read": "GB/s",
    "bandwidth": "share",
    "start": "s",
    "load": "s",
    "memory": "MiB",
    "peak": "×",
    "quality": "nats",
}
PACKAGES = (
    "torch",
    "transformers",
    "llama-cpp-python",
    "openvino-genai",
    "ctranslate2",
    "onnxruntime-genai",
    "uvicorn",
    "aiohttp",
)


@dataclass(frozen=True)
class Ratio:
    """One series over another, divided round by round: engines of the same round had the same machine."""

    over: str
    under: str
    median: float
    least: float
    most: float


def ratios(series: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[Ratio]:
    """The ratio of each pair of names."""
    found = []
    for over, under in pairs:
        found.append(Ratio(over, under, *rounds_ratio(series[over], series[under])))
    return found


def rounds_ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most of the ratios, round by round."""
    values = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.median(values), min(values), max(values)


def table(series: Mapping[str, Sequence[float]]) -> str:
    """A line for each series: median, least and most."""
    lines = {
        name: (statistics.median(values), min(values), max(values), UNITS[name.split()[0]])
        for name, values in series.items()
    }
    return _lines(lines)


def ratio_table(found: Sequence[Ratio]) -> str:
    """A line for each ratio: median, least and most of its rounds."""
    return _lines({f"{r.over} / {r.under}": (r.median, r.least, r.most, "") for r in found})


def _lines(lines: Mapping[str, tuple[float, float, float, str]]) -> str:
    width = max(map(len, lines), default=0)
    text = [f"{'':{width}}  {'median':>9} {'min':>9} {'max':>9}"]
    for name, (*numbers, unit) in lines.items():
        text.append(f"{name:{width}}  {' '.join(f'{digits(number):>9}' for number in numbers)} {unit}".rstrip())
    return "\n".join(text)


def conditions(threads: int, repeats: int, watch: Watch, root: Path) -> dict[str, Any]:
    """Machine, versions and commit; rounds, how many were repeated and how many stayed disturbed."""
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
        "rounds": watch.rounds,
        "rounds_repeated": watch.repeated,
        "rounds_disturbed": watch.disturbed_rounds,
    }


def as_json(about: Mapping[str, Any], series: Mapping[str, Sequence[float]], found: Sequence[Ratio]) -> str:
    parts = {name: {"unit": UNITS[name.split()[0]], "values": list(values)} for name, values in series.items()}
    return json.dumps({**about, "series": parts, "ratios": [asdict(ratio) for ratio in found]})


def digits(value: float) -> str:
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
