"""The lab's command line on the committed tiny checkpoint: every command runs, and prints a table, JSON or CSV."""

import csv
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from llama_mini import Llama, lab
from llama_mini.lab import commands, training
from llama_mini.lab.__main__ import main, parser
from llama_mini.tokenizer import Tokenizer
from tests.tiny_families import random_model

TINY = Path(__file__).parent.parent / "tiny"
TEXT = ["--tokens", "24"]
HAS_PICTURE = ("norms", "capture", "attention", "gradients", "ablate", "skip", "predict", "init", "sweep", "race")
PRE = ["attention.pre_norm", "feed_forward.pre_norm"]
SLOTS = {
    "llama": PRE,
    "olmo2": ["attention.out_norm", "attention.q_norm", "attention.k_norm", "feed_forward.out_norm"],
    "qwen3": [*PRE, "attention.q_norm", "attention.k_norm"],
}
ON_A_TEXT = {
    "capture": [],
    "ablate": ["layers.*.*.pre_norm"],
    "edit": ["layers.0.*.pre_norm", "eps=1e-3", "gain=scale:0.5"],
    "skip": [],
    "audit": [],
    "move": ["layers.*.feed_forward.pre_norm", "--to", "out"],
    "insert": [],
    "fold": [],
    "attention": [],
    "gradients": [],
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


@pytest.mark.parametrize("command", [*ON_A_TEXT, "norms", "norms --folded"])
def test_a_table_and_its_json_and_csv_say_the_same(
    command: str, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*command.split(), *ON_A_TEXT.get(command, []), *model, *(TEXT if command in ON_A_TEXT else [])]
    table = out(args, capsys).splitlines()
    rows = json.loads(out([*args, "--json"], capsys))
    lines = list(csv.DictReader(io.StringIO(out([*args, "--csv"], capsys))))
    assert list(rows[0]) == list(lines[0])
    assert table[0].split() == [name for name in rows[0] if any(row[name] is not None for row in rows)]
    assert len(table) - 1 >= len(rows) == len(lines) > 0


@pytest.mark.parametrize("command", OF_A_PLAN)
def test_plans_need_no_checkpoint(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(out([command, *OF_A_PLAN[command], "--json"], capsys))
    assert len(rows) == {"predict": 4, "init": 3}[command]


@pytest.fixture(scope="module", params=["llama", "olmo2", pytest.param("qwen3", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    random_model(request.param, seed=1, vocab_size=260).save_pretrained(folder)
    return request.param, ["--model", str(folder)]


@pytest.mark.parametrize("command", ["capture", "attention", "gradients", "edit", "ablate", "skip", "norms", "doctor"])
def test_every_family_goes_through_every_command(
    command: str, family: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    name, model = family
    slots = SLOTS[name]
    of_layers = {f"layers.{i}.{slot}" for i in range(3) for slot in slots}
    args = {"edit": [f"layers.*.{slots[0]}", "gain=scale:0.5"], "ablate": [",".join(f"layers.*.{s}" for s in slots)]}
    words = [command, *args.get(command, []), *model, *(TEXT if command != "norms" else [])]
    rows = json.loads(out([*words, "--json"], capsys))
    found = {row["path"] for row in rows if "path" in row}
    if command in ("norms", "ablate"):
        assert found == of_layers | ({"norm"} if command == "norms" else set())
    elif command == "capture":
        assert found >= of_layers | {"norm", "layers.0.resid_pre", "layers.2.resid_mid", "layers.2.resid_post"}
    elif command == "doctor":
        assert all(row["severity"] != "error" for row in rows)
    if command in ("ablate", "skip"):
        assert all(abs(row["dloss"]) > 1e-6 and row["kl"] > 0 for row in rows)
    if command == "edit":
        assert rows[1]["kl"] > 1e-4


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


def test_an_inserted_norm_is_the_one_that_was_asked_for(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["insert", "layers.0.attention.out_norm", "--gain", "one", *model, *TEXT]
    out([*words, "--norm", '{"kind": "layer", "eps": 0.5}', "--save", str(tmp_path / "new")], capsys)
    rows = {row.path: row for row in lab.norms(Llama.from_pretrained(tmp_path / "new"))}
    new = rows["layers.0.attention.out_norm"]
    assert (new.kind, new.eps, new.min, new.max) == ("layer", 0.5, 1.0, 1.0)
    for wrong, message in (("{kind}", "--norm is not JSON"), ('{"kin": 1}', "unknown kin; known:"), ("3", "an object")):
        assert main([*words, "--norm", wrong]) in (2, 3)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["move", "insert", "fold"])
def test_a_saved_model_has_its_tokenizer(
    command: str, model: list[str], tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, *ON_A_TEXT[command], *model, *TEXT, "--save", str(tmp_path / "new")]
    out(words, capsys)
    ours, theirs = (Tokenizer.from_pretrained(path) for path in (tmp_path / "new", tiny_dir))
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.eos_ids == theirs.eos_ids
    assert main(words) == 3  # before anything is measured
    printed, error = capsys.readouterr()
    assert (printed, "new exists already; give a new or an empty directory" in error) == ("", True)


def test_a_report_is_one_page_whose_captions_can_be_run(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "race", partial(training.race, steps=2, seeds=1))
    (tmp_path / "a text.txt").write_text("It's one thing, and one thing more, that the tokens of this text say.")
    text = ["--text", "a text.txt", "--tokens", "20"]
    assert out(["report", "norms.html", *model, *text], capsys) == "norms.html\n"
    page = (tmp_path / "norms.html").read_text(encoding="utf-8")
    assert "A race of plans" in page
    made = [shlex.split(html.unescape(code)) for code in re.findall("<code>(python .*?)</code>", page)]
    assert [words[:3] for words in made] == [["python", "-m", "llama_mini.lab"]] * 10
    printed = {words[3]: out(words[3:], capsys) for words in made}
    assert list(printed) == ["ablate", "norms", "capture", "skip", "doctor", "init", "race"]
    costs = [[*row.values()] for row in json.loads(out([*made[4][3:], "--json"], capsys))]
    path, dloss, se, *_ = max(costs, key=lambda row: row[1])
    assert f"The highest cost is that of {path}, {dloss:+.3g} ± {se:.2g} nats per token" in page
    assert printed["ablate"].splitlines()[-2].startswith("norm ")
    assert {"rms.svg", "cost.svg", "gains.svg", "layers.svg", "init.svg", "race.svg"} < {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize(
    ("command", "suffix"), zip(HAS_PICTURE, [".png", ".svg"] * (len(HAS_PICTURE) // 2), strict=True)
)
def test_a_picture_is_drawn_beside_the_table(
    command: str, suffix: str, model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra lab")
    picture = tmp_path / f"picture{suffix}"
    args = [command, *ON_A_TEXT.get(command, []), *OF_A_PLAN.get(command, [])]
    args += {"sweep": ["pre", "--depths", "2", "3"], "race": ["pre", "--steps", "1"]}.get(command, [])
    args += [*model, *(TEXT if command in ON_A_TEXT else [])] if command in (*ON_A_TEXT, "norms") else []
    table = out(args, capsys)
    assert out([*args, "--picture", str(picture)], capsys) == table
    assert picture.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<svg"}[suffix])


@pytest.mark.parametrize("command", ["ablate", "race"])
@pytest.mark.parametrize(
    ("picture", "message"), [("a.jpg", "saved as .png or .svg"), ("no/a.svg", "no folder no; make it first")]
)
def test_a_picture_that_cannot_be_is_refused_before_the_work(
    command: str,
    picture: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(commands.COMMANDS, command, None)  # type: ignore[arg-type]
    assert main([command, "--picture", picture]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["sweep", "--picture", "a.svg"], ["report", "a.html"]])
def test_without_matplotlib_nothing_is_begun(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("read_model", "checkpoint"):
        monkeypatch.setattr(commands, name, None)
    assert main(words) == 2
    assert "pip install 'llama-mini[lab]'" in capsys.readouterr().err


def test_the_study_prints_commands_that_exist_and_shows_pictures_that_are_there() -> None:
    folder = TINY.parents[1] / "llama_mini" / "lab"  # of the checkout: a wheel has no pictures
    study = (folder / "STUDY.md").read_text(encoding="utf-8")
    words = [shlex.split(line, comments=True) for line in re.findall(r"python -m llama_mini\.lab ([^`\n]*)", study)]
    given = [parser().parse_args(line) for line in words]
    assert len(given) > 8
    shown = re.findall(r"!\[[^]]*\]\((.*?)\)", study)
    shown.remove("healing_study.svg")  # drawn from its data: see test_study_pages.py
    assert sorted(shown) == sorted(str(args.picture) for args in given if getattr(args, "picture", None))
    assert len(shown) == 5
    assert all((folder / name).stat().st_size < 60_000 for name in shown)


def test_a_healthy_checkpoint_has_no_findings(smollm2_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert out(["doctor", "--model", str(smollm2_dir), *TEXT], capsys) == "nothing found\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["edit", "layers.9.*.pre_norm"], 2, "matches no norm"),
        (["edit", "norm", "eps"], 2, "an edit is written KEY=VALUE"),
        (["edit", "norm", "eps=1", "eps=2"], 2, "given twice"),
        (["edit", "norm", "colour=red"], 2, "colour"),
        (["edit", "keep=none"], 2, "keep needs freeze"),
        (["ablate", "norm,norn"], 2, "'norn' matches no norm; the norms are "),
        (["ablate", "keep=all"], 2, "unknown keep 'all'; known: none, first, massive"),
        (["capture", "--tokens", "1"], 2, "--tokens must be a whole number of at least 2, not 1"),
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


@pytest.mark.slow
def test_a_reader_that_leaves_early_ends_it_quietly(tiny_dir: Path) -> None:
    command = f"{sys.executable} -m llama_mini.lab norms --csv --model {tiny_dir} | head -n 0"
    assert subprocess.run(["sh", "-c", command], capture_output=True, check=True).stderr == b""


def test_every_command_is_listed_and_its_help_waits_for_nothing() -> None:
    listed = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(listed) == {
        *ON_A_TEXT, *OF_A_PLAN, "norms", "compare", "doctor", "sweep", "race", "heal", "report", "tour",
    }  # fmt: skip
    code = "import sys; from llama_mini.lab.__main__ import parser; parser(); "
    code += "assert not {'torch', 'jinja2'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
