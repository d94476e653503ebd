"""The lab's command line on the committed tiny checkpoint: every command runs, and prints a table, JSON or CSV."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_mini import Llama, lab
from llama_mini.lab.__main__ import main, parser
from llama_mini.tokenizer import Tokenizer

TEXT = ["--tokens", "24"]
ON_A_TEXT = {
    "capture": [],
    "ablate": ["layers.*.*.pre_norm"],
    "edit": ["layers.0.*.pre_norm", "eps=1e-3", "gain=scale:0.5"],
    "skip": [],
    "move": ["layers.*.feed_forward.pre_norm", "--to", "out"],
    "fold": [],
}
OF_A_PLAN = {
    "predict": ["peri", "--depth", "3"],
    "init": ["pre", "--depth", "2", "--dim", "32", "--seeds", "1"],
}


@pytest.fixture
def model(tiny_dir: Path) -> list[str]:
    return ["--model", str(tiny_dir)]


def out(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(args) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [*ON_A_TEXT, "norms"])
def test_a_table_and_its_json_and_csv_say_the_same(
    command: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = [command, *ON_A_TEXT.get(command, []), *model, *(TEXT if command in ON_A_TEXT else [])]
    table = out(args, capsys).splitlines()
    rows = json.loads(out([*args, "--json"], capsys))
    lines = list(csv.DictReader(io.StringIO(out([*args, "--csv"], capsys))))
    assert table[0].split() == list(rows[0]) == list(lines[0])
    assert len(table) - 1 >= len(rows) == len(lines) > 0


@pytest.mark.parametrize("command", OF_A_PLAN)
def test_plans_need_no_checkpoint(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(out([command, *OF_A_PLAN[command], "--json"], capsys))
    assert len(rows) == {"predict": 4, "init": 3}[command]


def test_an_edit_costs_what_the_function_says(
    model: list[str], tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, edited = json.loads(out(["edit", *ON_A_TEXT["edit"], *model, *TEXT, "--json"], capsys))
    ours = Llama.from_pretrained(tiny_dir)
    text = (Path(lab.__file__).parent / "text.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_pretrained(tiny_dir).encode(text)[:24]
    before = lab.score(ours, ids)
    with lab.edit(ours, {"layers.0.*.pre_norm": {"eps": 1e-3, "gain": ("scale", 0.5)}}):
        after = lab.score(ours, ids, against=before)
    assert (base["loss"], edited["dloss"], edited["kl"]) == (before.loss, after.dloss, after.kl)
    assert after.kl is not None
    assert after.kl > 1e-4


def test_a_moved_model_is_saved(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out(["move", *ON_A_TEXT["move"], *model, *TEXT, "--save", str(tmp_path / "moved")], capsys)
    moved = lab.norms(Llama.from_pretrained(tmp_path / "moved"))
    assert {row.slot for row in moved if "feed_forward" in row.path} == {"out_norm"}


def test_a_report_is_one_page(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "norms.html"
    assert out(["report", str(target), *model, *TEXT], capsys) == f"{target}\n"
    assert "</html>" in target.read_text(encoding="utf-8")


def test_a_healthy_checkpoint_has_no_findings(smollm2_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert out(["doctor", "--model", str(smollm2_dir), *TEXT], capsys) == "nothing found\n"


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_tour_counts_on_real_activations(
    smollm2_dir: Path, language: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = json.loads(out(["tour", "--lang", language, "--json", "--model", str(smollm2_dir)], capsys))
    assert [step["title"][0] for step in steps] == list("12345678")
    numbers = {step["title"][0]: "\n".join(step["numbers"]) for step in steps}
    assert "(10, 576)" in numbers["1"]
    assert numbers["2"].count("fails") == 2
    assert "eps inside 0.3015" in numbers["5"]  # at an RMS of 0.001 and eps 1e-5: 1/√(1 + 10)
    share = float(numbers["7"].split("differ in ")[1].split(" %")[0])
    assert 20 < share < 30  # 25.9 % with random gains
    assert any("가" <= char <= "힣" for char in steps[0]["text"]) is (language == "ko")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["edit", "layers.9.*.pre_norm"], 2, "matches no norm"),
        (["edit", "norm", "eps"], 2, "an edit is written KEY=VALUE"),
        (["edit", "norm", "eps=1", "eps=2"], 2, "given twice"),
        (["edit", "norm", "colour=red"], 2, "colour"),
        (["capture", "--tokens", "1"], 2, "--tokens must be at least 2"),
        (["capture", "--text", "/absent"], 3, "cannot read /absent"),
        (["tour", "--csv"], 2, "leave --csv out"),
        (["report", "--json"], 2, "leave --json and --csv out"),
    ],
)
def test_a_mistake_is_one_sentence(
    args: list[str], code: int, message: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, *model]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_a_reader_that_leaves_early_ends_it_quietly(tiny_dir: Path) -> None:
    command = f"{sys.executable} -m llama_mini.lab norms --csv --model {tiny_dir} | head -n 0"
    assert subprocess.run(["sh", "-c", command], capture_output=True, check=True).stderr == b""


def test_every_command_is_listed_and_its_help_waits_for_nothing() -> None:
    listed = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(listed) == {
        *ON_A_TEXT, *OF_A_PLAN, "norms", "doctor", "sweep", "race", "report", "tour",
    }  # fmt: skip
    code = "import sys; from llama_mini.lab.__main__ import parser; parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
