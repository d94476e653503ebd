"""Where the time goes: operator by operator, and in Python between them."""

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

LINES = 20


def profiled(run: Callable[[], object], what: str) -> str:
    """A table of each operator's own time in one run. Recording slows every operator by some microseconds."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        begun = time.perf_counter()
        run()
        wall = time.perf_counter() - begun
    inside = sum(event.time_range.elapsed_us() for event in recorded.events() if event.cpu_parent is None) / 1e6
    operators = sorted(recorded.key_averages(), key=lambda entry: -entry.self_cpu_time_total)[:LINES]
    lines = [f"{what}: {wall:.3f} s", f"{'total ms':>10} {'share':>6} {'calls':>7} {'µs a call':>10}  operator"]
    rows = [(entry.self_cpu_time_total / 1e6, entry.count, entry.key) for entry in operators]
    rows.append((max(0.0, wall - inside), 1, "Python between operators"))
    for seconds, count, name in rows:
        share, each = 100 * seconds / wall, 1e6 * seconds / count
        lines.append(f"{1e3 * seconds:10.1f} {share:5.1f}% {count:7d} {each:10.1f}  {name}")
    return "\n".join(lines)
