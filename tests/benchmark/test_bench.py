"""scripts/bench.py: a smoke run of every measure, whose numbers are not judged, and the texts that it scores."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

import bench
from benchmark.run import TEXTS

SCRIPT = Path(bench.__file__)
# Every figure of quality or prefill was taken on these very texts. A change makes old figures and new ones differ.
CHECKSUMS = {
    "prose.txt": "3449d8ac6ac520f8e4ac70de5b0a88ff6c53a256c47901f7b7ccea9d1d2fdc8d",
    "manual.txt": "98e1268513b258f6a063d1febcec1b580ca9ce4c3e568f347f31d8c13e79b807",
    "code.txt": "c7149d82e2b4326e7f167c58331c1528ebfa7d0711fcbc2eb34be7a03137d798",
}


def run_bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=1200)


def test_the_texts_are_those_that_the_figures_were_taken_on() -> None:
    assert {path.name: sha256(path.read_bytes()).hexdigest() for path in TEXTS.iterdir()} == CHECKSUMS


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_dir")
def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    run = run_bench("--quick", "--json", str(tmp_path / "run.json"))
    assert run.returncode == 0, run.stderr
    line = run.stdout.splitlines()[-1]
    assert (tmp_path / "run.json").read_text() == line + "\n"
    found = json.loads(line)
    measures = [
        "decode",
        "prefill",
        "batch",
        "verify",
        "read",
        "context",
        "long",
        "files",
        "bandwidth",
        "busy",
        "start",
        "quality",
        "load",
        "memory",
    ]
    assert {name.split()[0] for name in found["series"]} == {*measures, "peak"}
    once = "peak over floor by size of the file, 1B Q4_K_M"
    assert all(len(s["values"]) == found["repeats"] for name, s in found["series"].items() if name != once)
    positive = [each["values"][0] for name, each in found["series"].items() if " over bfloat16" not in name]
    assert min(positive) > 0
    names = [(ratio["over"], ratio["under"]) for ratio in found["ratios"]]
    assert len(set(names)) == len(names)
    assert {name for pair in names for name in pair} <= found["series"].keys()
    paired = {"decode", "prefill", "batch", "verify", "context", "long", "busy", "start", "load"}
    assert {over.split()[0] for over, _ in names} - {"files"} == paired  # files: beside llama.cpp alone
    for peer, module in {
        "llama.cpp": "llama_cpp",
        "OpenVINO": "openvino_genai",
        "ONNX Runtime": "onnxruntime_genai",
    }.items():
        left_out = f"{peer} is left out: {module} is not installed" in run.stderr
        assert left_out != any(name.endswith(peer) for name in found["series"])
        assert left_out != any(under.endswith(peer) for _, under in names)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_dir")
def test_a_quick_profile_has_a_table_for_each_format() -> None:
    run = run_bench("--quick", "--profile")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Python between operators") == 4


def test_an_unknown_measure_is_an_error_that_lists_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "decode,speed"])
    assert bench.main() == 2
    assert capsys.readouterr().err == (
        "error: unknown measure 'speed' in --only; "
        "known: decode, prefill, batch, verify, context, long, files, busy, start, load, memory, quality\n"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--formats int8", "--formats is of the measure --serve: give --serve too"),
        ("--users 4", "--users is of the measure --serve: give --serve too"),
        ("--server a=b", "--server is of the measure --serve: give --serve too"),
        ("--serve --server a=", "--server is NAME=COMMAND or NAME=ADDRESS, not 'a'"),
        ("--serve --formats int8,float32", "unknown --formats 'float32'; known: bfloat16, int8, int4"),
        ("--serve --users 1,0", "--users are whole numbers from 1 on, such as 1,4, not '1,0'"),
    ],
)
def test_what_serve_cannot_measure_is_an_error(
    words: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *words.split()])
    assert bench.main() == 2
    assert capsys.readouterr().err == f"error: {reason}\n"


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_dir")
def test_a_quick_run_of_serve_measures_every_server(tmp_path: Path) -> None:
    run = run_bench("--serve", "--quick", "--formats", "int4", "--users", "1,2", "--json", str(tmp_path / "run.json"))
    assert run.returncode == 0, run.stderr
    found = [(cell["users"], cell["server"]) for cell in json.loads((tmp_path / "run.json").read_text())["serving"]]
    ours = [(1, "llama_mini"), (1, "llama_mini, guessing tokens"), (2, "llama_mini"), (2, "llama_mini, chats")]
    ours += [(2, "llama_mini without a server"), (4, "llama_mini beside a prompt of 200 tokens")]
    assert [cell for cell in found if cell[1] != "llama-server"] == ours
    assert ("llama-server is left out" in run.stderr) != ((2, "llama-server") in found)
    assert "\n| new tokens per second, int4, llama_mini, chats / llama_mini |  | " in run.stdout
