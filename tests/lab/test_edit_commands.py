"""The commands that change norms: they mean what edit and ablate mean, and end in an error where those end in NaN."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_mini import Llama, NormPlan, Tokenizer, lab
from llama_mini.lab.__main__ import main

TINY = Path(__file__).parents[1] / "tiny"
TEXT = ["--tokens", "24"]


@pytest.fixture(scope="module")
def ids(tiny_dir: Path) -> list[int]:
    text = (Path(lab.__file__).parent / "text.txt").read_text(encoding="utf-8")
    return Tokenizer.from_pretrained(tiny_dir).encode(text)[:24]


@pytest.mark.parametrize(
    ("command", "words", "settings"),
    [
        ("ablate", [], {"freeze": "quadratic"}),
        ("ablate", ["keep=none"], {"freeze": "quadratic", "keep": "none"}),
        ("edit", ["freeze=quadratic"], {"freeze": "quadratic"}),
        ("edit", ["freeze=quadratic", "keep=none"], {"freeze": "quadratic", "keep": "none"}),
        ("ablate", ["layers.0.attention.*,norm", "eps=0.5"], {"eps": 0.5}),
        ("edit", ["layers.0.attention.*,norm", "eps=0.5"], {"eps": 0.5}),
    ],
)
def test_pattern_and_settings_mean_the_same_in_edit_ablate_and_python(
    command: str, words: list[str], settings: dict, ids: list[int], tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *words, "--model", str(tiny_dir), *TEXT, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    ours, pattern = Llama.from_pretrained(tiny_dir), words[0] if "," in "".join(words) else "layers.*.*.*"
    if command == "ablate":
        assert [row["dloss"] for row in rows] == lab.ablate(ours, ids, pattern, **settings).column("dloss")
    else:
        base = lab.score(ours, ids)
        with lab.edit(ours, {pattern: settings}, ids):
            assert rows[1]["dloss"] == lab.score(ours, ids, against=base).dloss


def saved(model: Llama, folder: Path) -> list[str]:
    """The options that name a model, saved beside the tiny checkpoint's tokenizer, and the text."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return ["--model", str(folder), *TEXT]


def test_without_a_pattern_the_norms_of_any_placement_are_frozen(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Llama.from_pretrained(tiny_dir).config
    config = replace(config, norm_plan=NormPlan.parse("out", config.n_layers))
    assert main(["ablate", *saved(Llama(config), tmp_path), "--json"]) == 0
    paths = [row["path"] for row in json.loads(capsys.readouterr().out)]
    assert paths[:2] == ["layers.0.attention.out_norm", "layers.0.feed_forward.out_norm"]


@pytest.fixture
def with_zeros(tiny_dir: Path, ids: list[int], tmp_path: Path) -> tuple[list[str], str]:
    """A checkpoint that embeds one token of the text as zeros, which a norm of eps 0 turns into NaN."""
    model = Llama.from_pretrained(tiny_dir, "float32")
    first = next(i for i, token in enumerate(ids) if i and ids.count(token) == 1)
    model.tok_embeddings.weight[ids[first]] = 0
    return saved(model, tmp_path / "zeros"), f"first at layers.0.attention.pre_norm, token {first}"


@pytest.mark.parametrize("form", ["table", "--json", "--csv"])
def test_a_row_of_nan_says_where_it_begins_and_the_command_fails(
    form: str, with_zeros: tuple[list[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, where = with_zeros
    options = ["--picture", str(tmp_path / "a.svg")] if form == "table" else [form]
    assert main(["ablate", "eps=0", *model, *options]) == 1
    printed, error = capsys.readouterr()
    n = len(lab.norms(Llama.from_pretrained(model[1]))) - 1
    assert error == f"error: 1 of {n} rows has no cost: NaN or infinity in the logits, {where}\n"
    if form == "--json":
        rows = json.loads(printed)
        assert [row["error"] is None for row in rows] == [False] + [True] * (n - 1)
        assert [row["dloss"] is None for row in rows] == [True] + [False] * (n - 1)
    else:
        assert len(printed.splitlines()) == n + 1 + (form == "table")  # and a note
    assert printed.count(where) == 1
    assert (tmp_path / "a.svg").exists() is (form == "table")


def test_an_edit_that_ends_in_nan_fails_and_says_where(
    with_zeros: tuple[list[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, where = with_zeros
    assert main(["edit", "layers.0.*.pre_norm", "eps=0", *model]) == 1
    assert capsys.readouterr() == ("", f"error: NaN or infinity in the logits, {where}\n")


@pytest.mark.parametrize("command", [["move", "layers.0.attention.pre_norm"], ["fold"], ["skip"], ["ablate"]])
def test_a_model_that_is_broken_already_fails_and_nothing_is_saved(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = Llama.from_pretrained(TINY)
    broken.layers[1].feed_forward.down_proj.weight[0, 0] = torch.inf
    model = saved(broken, tmp_path / "broken")
    save = ["--save", str(tmp_path / "new")] if command[0] in ("move", "fold") else []
    assert main([*command, *model, *save]) == 1
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error == "error: NaN or infinity in the logits, first at layers.1.feed_forward.down_proj, token 0\n"
    assert not (tmp_path / "new").exists()
