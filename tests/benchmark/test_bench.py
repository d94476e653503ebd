"""scripts/bench.py: a smoke run of every measure; no number is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), *words], capture_output=True, text=True, timeout=1200
    )


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_dir")
def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    run = bench("--quick", "--json", str(tmp_path / "run.json"))
    assert run.returncode == 0, run.stderr
    line = run.stdout.splitlines()[-1]
    assert (tmp_path / "run.json").read_text() == line + "\n"
    found = json.loads(line)
    measures = ["decode", "prefill", "batch", "read", "context", "bandwidth", "start", "quality", "load", "memory"]
    assert {name.split()[0] for name in found["series"]} == {*measures, "peak"}
    assert all(len(each["values"]) == found["repeats"] for each in found["series"].values())
    positive = [each["values"][0] for name, each in found["series"].items() if " over bfloat16" not in name]
    assert min(positive) > 0
    judged = {target["over"].split()[0] for target in found["targets"]}
    assert {"decode", "start", "load", "peak", "bandwidth", "quality"} <= judged
    for peer, module in {"llama.cpp": "llama_cpp", "OpenVINO": "openvino_genai"}.items():
        left_out = f"{peer} is left out: {module} is not installed" in run.stderr
        assert left_out != any(name.endswith(peer) for name in found["series"])
        assert left_out or "prefill" in judged  # which is held to these peers alone


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_dir")
def test_a_quick_profile_has_a_table_for_each_format() -> None:
    run = bench("--quick", "--profile")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Python between operators") == 4


def test_an_unknown_measure_is_an_error_that_lists_those_there_are() -> None:
    run = bench("--only", "decode,speed")
    assert run.returncode == 2
    assert run.stderr == (
        "error: --only knows no measure 'speed'; "
        "give some of decode, prefill, batch, context, start, load, memory, quality\n"
    )
