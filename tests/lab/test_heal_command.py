"""The command heal: its table, its picture, what it saves, and how it fails."""

import json
from pathlib import Path

import pytest

from llama_mini import Llama, Tokenizer, lab
from llama_mini.lab import heal_command
from llama_mini.lab.__main__ import main
from llama_mini.lab.healing import Healed
from llama_mini.lab.training import sample_text
from tests.oracles import same_bits
from tests.tiny_models import random_tokens

LAST_THIRD = "layers.1-1.feed_forward.{}_norm"  # of two layers


@pytest.fixture
def options(tiny_dir: Path, tmp_path: Path) -> list[str]:
    """A model, steps, and texts of few tokens: one to hold out, one to train on."""
    train = tmp_path / "train.txt"
    train.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return ["--model", str(tiny_dir), "--steps", "3", "--rows", "2", "--tokens", "20", "--train", str(train)]


def test_a_moved_norm_is_healed_drawn_and_saved(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, saved, state = tmp_path / "a.svg", tmp_path / "saved", tmp_path / "state"
    words = ["heal", "layers.1.*.pre_norm", *options, "--folder", str(state)]
    assert main([*words, "--picture", str(picture), "--save", str(saved)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["run", "tokens", "seconds", "dloss", "se", "kl", "top1"]
    assert [line.split()[0] for line in printed[1:-1]] == ["change"] * 4 + ["control"] * 4
    assert printed[-1].startswith("3 steps, ")
    assert "a random change of equal KL" in picture.read_text()
    assert Tokenizer.from_pretrained(saved).vocab_size == 260
    assert main([*words, "--json"]) == 0  # from the state
    rows = json.loads(capsys.readouterr().out)
    model, given = Llama.from_pretrained(saved), Llama.from_pretrained(options[1], "float32")
    assert model.config.norm_plan.layer(1)[0].out is not None
    ids = [*random_tokens(2, 20, 256)]
    base = lab.score(given, ids)
    assert (
        lab.score(model, ids, against=base).kl < lab.score(lab.move(given, "layers.1.*.pre_norm", "out"), ids, base).kl
    )
    assert {row["run"] for row in rows} == {"change", "control"}
    assert rows[3]["kl"] < rows[0]["kl"]


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["layers.1.*.pre_norm", "kind=layer", "--taper"], {"layers.1.*.pre_norm": {"kind": "layer"}}),
        (["layers.*.*.*", "freeze=median", "keep=massive"], {"layers.*.*.*": {"freeze": "median", "keep": "massive"}}),
        (["kind=layer"], {LAST_THIRD.format("pre"): {"kind": "layer"}}),
        (["layers.1.*.pre_norm", "--to", "post"], "move"),
        (["--to", "out"], "move"),
        (["layers.1.*.out_norm", "--insert"], "insert"),
        (["--insert"], "insert"),
    ],
)
def test_the_change_is_that_of_edit_move_and_insert(
    words: list[str], change: dict | str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(model: Llama, found: dict | Llama, **settings: object) -> Healed:
        text = settings["text"]
        tokens = random_tokens(1, 9, 256)
        if change == "move":
            pattern = words[0] if len(words) == 3 else LAST_THIRD.format("pre")
            assert same_bits(found(tokens), lab.move_fitted(model, pattern, words[-1], text[:1024])(tokens))
        elif change == "insert":
            pattern = words[0] if len(words) == 2 else LAST_THIRD.format("out")
            assert same_bits(found(tokens), lab.insert(model, pattern, text[:1024])(tokens))
        else:
            assert found == change
        given = [settings[name] for name in ("minutes", "seed", "steps", "taper")]
        assert given == [2.0, 0, 3, True if "--taper" in words else None]
        assert [len(row) for row in settings["held_out"]] == [20, 20]
        raise KeyboardInterrupt

    monkeypatch.setattr(heal_command.lab, "heal", stop)
    assert main(["heal", *words, *options]) == 130


def test_a_frozen_norm_is_saved_as_one_that_has_learned(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["heal", "layers.1.*.pre_norm", "freeze=median", "keep=none", *options, "--no-control"]
    assert main([*words, "--save", str(tmp_path / "saved"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    model, given = Llama.from_pretrained(tmp_path / "saved"), Llama.from_pretrained(options[1], "float32")
    text = Tokenizer.from_pretrained(options[1]).encode(Path(options[-1]).read_text())
    frozen = lab.edited(given, {"layers.1.*.pre_norm": {"freeze": "median", "keep": "none"}}, text[:1024])
    assert {row.path for row in lab.norms(model) if row.kind == "frozen"} == {
        "layers.1.attention.pre_norm",
        "layers.1.feed_forward.pre_norm",
    }
    before, after = (m.layers[1].attention.pre_norm.inverse_rms for m in (frozen, model))
    assert 0 < (after - before).abs() < 0.1 * before
    held_out = [Tokenizer.from_pretrained(options[1]).encode(sample_text())[i : i + 20] for i in (0, 20)]
    base = lab.score(given, held_out)
    for m, row in ((frozen, rows[0]), (model, rows[-1])):
        assert lab.score(m, held_out, base).dloss == pytest.approx(row["dloss"], abs=1e-5)


def test_by_default_texts_are_those_of_the_lab(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(model: Llama, *_: object, **settings: object) -> Healed:
        assert (settings["text"], settings["held_out"], settings["control"]) == (None, None, False)
        assert isinstance(settings["tokenizer"], Tokenizer)
        raise KeyboardInterrupt

    monkeypatch.setattr(heal_command.lab, "heal", stop)
    assert main(["heal", "layers.1.*.pre_norm", "--model", str(tiny_dir), "--no-control"]) == 130


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers.1.*.pre_norm", "kind=layer", "--to", "out"], "give an edit, --insert or --to, and only one of them"),
        (["layers.1.*.pre_norm", "--insert", "--to", "out"], "give an edit, --insert or --to, and only one of them"),
        (["layers.1.*.*", "freeze=median", "--save", "new"], "layers.1.attention.pre_norm would be frozen with tokens"),
        (["layers.9.*.pre_norm"], "matches no norm"),
        (["layers.1.*.pre_norm", "--minutes", "0"], "minutes must be a finite number above 0"),
    ],
)
def test_what_cannot_be_done_is_refused(
    words: list[str], message: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["heal", *words, *options]) == 2
    assert message in capsys.readouterr().err
