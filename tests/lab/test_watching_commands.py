"""The commands that show what flows through a checkpoint, and two checkpoints side by side."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from llama_mini import Llama, lab
from llama_mini.lab import massive_activations, recording
from llama_mini.lab.__main__ import main, parser
from llama_mini.lab.command_io import read_ids
from llama_mini.tokenizer import Tokenizer
from tests.lab.test_commands import TEXT, TINY, out
from tests.tiny_families import random_model


@pytest.fixture
def model(tiny_dir: Path) -> list[str]:
    return ["--model", str(tiny_dir)]


def test_capture_tells_the_first_token_apart_and_the_life_of_massive_activations(
    model: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = out(["capture", *model, *TEXT], capsys)
    assert printed.split()[:4] == ["path", "rms", "first", "median"]
    assert "massive" not in printed
    monkeypatch.setattr(massive_activations, "MASSIVE", 3)
    monkeypatch.setattr(recording, "MASSIVE", 3)
    table, life = out(["capture", *model, *TEXT], capsys).split("\n\n")
    assert table == printed.rstrip("\n")
    assert life.splitlines()[1].split()[:3] == ["token", "text", "layers"]
    elements = json.loads(out(["capture", "--massive", "--json", *model, *TEXT], capsys))
    assert len(life.splitlines()) - 2 == len({element["token"] for element in elements}) > 1
    assert all(element["times_median"] >= 3 for element in elements)


def test_two_checkpoints_side_by_side(
    model: list[str], tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    out(["move", *model, *TEXT, "--save", str(moved)], capsys)
    args = ["compare", str(tiny_dir), str(moved)]
    found = json.loads(out([*args, *TEXT, "--json"], capsys))
    ids = read_ids(Tokenizer.from_pretrained(tiny_dir), parser().parse_args([*args, *TEXT]))
    ours = lab.compare(*map(Llama.from_pretrained, (tiny_dir, moved)), ids)
    assert found["losses"][1]["dloss"] == ours.b.dloss
    assert [row["path"] for row in found["norms"]] == ours.norms.column("path")
    assert [row["median_change"] for row in found["stream"]] == ours.stream.column("median_change")
    tables = [part.splitlines() for part in out([*args, "norm", "skip=true", *TEXT], capsys).split("\n\n")]
    assert [lines[0] for lines in tables] == ["losses", "norms", "stream"]
    assert [line.split()[0] for line in tables[0][1:]] == ["model", "a", "b"]
    assert len(tables[2]) - 2 == len(ours.stream)
    if importlib.util.find_spec("matplotlib"):
        out([*args, "freeze=median", *TEXT, "--picture", str(tmp_path / "a.svg")], capsys)
        assert (tmp_path / "a.svg").exists()


def test_checkpoints_with_other_tokens_or_shapes_are_not_compared(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    random_model("llama", seed=1, vocab_size=260, num_hidden_layers=2).save_pretrained(tmp_path)
    assert main(["compare", str(tiny_dir), str(tmp_path), *TEXT]) == 2
    assert "the two models differ in " in capsys.readouterr().err
    text = (TINY / "tokenizer.json").read_text()
    data = json.loads(text)
    a, b = (data["model"]["vocab"][letter] for letter in "ai")
    data["model"]["vocab"] |= {"a": b, "i": a}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert main(["compare", str(tiny_dir), str(tmp_path), *TEXT]) == 2
    assert f"the tokenizers of {tiny_dir} and {tmp_path} split the text differently" in capsys.readouterr().err
    assert main(["compare", str(tiny_dir), str(tmp_path), "--csv"]) == 2
    assert "leave --csv out" in capsys.readouterr().err
