"""Norms ablated together and one after another, with constants of the same or of other texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_mini import Llama, Tokenizer, lab
from llama_mini.errors import RequestError
from llama_mini.lab.__main__ import main
from llama_mini.lab.editing import SETTINGS, edited_norms
from llama_mini.lab.freezing import FREEZE
from llama_mini.lab.settings_help import SETTINGS_HELP
from llama_mini.model.norm import NORMS
from tests.tiny_models import random_tokens, tiny_model

TEXT, OTHER = random_tokens(2, 23), random_tokens(3, 31, seed=9)
PRE = "layers.*.*.pre_norm"
PATHS = [f"layers.{i}.{branch}.pre_norm" for i in range(3) for branch in ("attention", "feed_forward")]


@pytest.fixture
def model() -> Llama:
    model = tiny_model()
    model.tok_embeddings.weight[TEXT[1, 3]] *= 8
    return model


def cost(model: Llama, edits: dict[str, Any], ids: Any = TEXT, calibrate: Any = None) -> tuple[float, float, float]:
    base = lab.score(model, TEXT)
    with lab.edit(model, edits, ids, calibrate):
        changed = lab.score(model, TEXT, against=base)
    return changed.dloss, changed.se, changed.kl


def costs(row: Any) -> tuple[float, float, float]:
    return row.dloss, row.se, row.kl


@pytest.mark.parametrize("settings", [{"freeze": "arithmetic", "keep": "massive"}, {"gain": "one"}], ids=str)
def test_joint_is_one_row_of_one_edit(model: Llama, settings: dict[str, Any]) -> None:
    (row,) = lab.ablate(model, TEXT, PRE, joint=True, **settings)
    assert row.path == PRE
    assert costs(row) == cost(model, {PRE: settings})
    assert (row.kept is None) is ("freeze" not in settings)
    assert abs(row.dloss) > 1e-4
    (every,) = lab.ablate(model, TEXT, joint=True)
    assert every.path == "every norm"
    assert costs(every) == cost(model, {f"{PRE},norm": {"freeze": "quadratic"}})


def test_cumulative_takes_the_cheapest_next(model: Llama) -> None:
    table = lab.ablate(model, TEXT, PRE, cumulative=True, keep="none")
    frozen, left = dict[str, Any](), [*PATHS]
    for row in table:
        tried = {path: cost(model, frozen | {path: {"freeze": "quadratic", "keep": "none"}}) for path in left}
        best = min(tried, key=lambda path: tried[path][0])
        assert (row.path, *costs(row)) == (best, *tried[best])
        frozen[best] = {"freeze": "quadratic", "keep": "none"}
        left.remove(best)
    assert not left
    assert costs(table[-1]) == costs(lab.ablate(model, TEXT, PRE, joint=True, keep="none")[0])
    assert table.column("path") != PATHS


def test_cumulative_in_a_given_order(model: Llama) -> None:
    order = ["layers.2.*.pre_norm", "norm", "layers.0.attention.*"]
    table = lab.ablate(model, TEXT, order, cumulative="given", freeze="median")
    assert table.column("path") == order
    frozen = dict[str, Any]()
    for row in table:
        frozen[row.path] = {"freeze": "median"}
        assert costs(row) == cost(model, frozen)
    assert lab.ablate(model, TEXT, cumulative="given").column("path") == [*PATHS, "norm"]


def test_constants_of_other_texts(model: Llama) -> None:
    """Padded, and without looking at the texts whose loss is measured."""
    settings = {"freeze": "quadratic", "keep": "none"}
    texts = [OTHER[0], OTHER[1, :7], OTHER[2]]
    table = lab.ablate(model, TEXT, PRE, calibrate=texts, **settings)
    for row in table:
        x = np.concatenate([lab.capture(model, text)[row.path].x[0].double().numpy() for text in texts])
        (norm,) = edited_norms(model, {row.path: settings}, TEXT, texts).values()
        assert float(norm.inverse_root) == pytest.approx(1 / np.sqrt((x**2).mean() + 1e-5), rel=1e-5)
        assert costs(row) == cost(model, {row.path: settings}, texts)
        assert costs(row) == cost(model, {row.path: settings}, TEXT, texts)
    assert table.column("dloss") != lab.ablate(model, TEXT, PRE, **settings).column("dloss")
    assert "constants measured on other texts" in table.note
    assert "measured on the same texts" in lab.ablate(model, TEXT, "norm").note


def test_massive_tokens_are_those_of_the_unedited_model(model: Llama) -> None:
    """Also where norms before have changed the input, and also with constants of other texts."""
    path, louder = "layers.1.feed_forward.pre_norm", {"layers.0.*.pre_norm": {"gain": ("scale", 5.0)}}
    massive = {path: {"freeze": "median", "keep": {"massive": 1.5}}}
    rms = lab.capture(model, TEXT)[path].rms.numpy()
    for calibrate in (None, OTHER):
        measured = rms if calibrate is None else lab.capture(model, calibrate)[path].rms.numpy()
        expected = rms > 1.5 * np.median(measured)
        with lab.edit(model, massive | louder, TEXT, calibrate):
            record, norm = lab.capture(model, TEXT)[path], model.get_submodule(path)
            own = record.x * torch.rsqrt(record.x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
            assert np.array_equal((record.y - own).abs().amax(-1) < 1e-6, expected)
            assert not np.array_equal(record.rms > 1.5 * norm.median, expected)
    assert 0 < expected.sum() < expected.size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"joint": True, "cumulative": True}, "joint edits all norms together, cumulative one after another"),
        ({"joint": 1}, "joint must be true or false, not 1"),
        ({"cumulative": "cheapest"}, "unknown cumulative 'cheapest'; known: given"),
        ({"calibrate": OTHER, "eps": 0.1}, "calibrate gives the texts for one constant per norm: freeze norms"),
        ({"calibrate": OTHER, "freeze": "token"}, "calibrate gives the texts .* not by token"),
        ({"calibrate": [1]}, "T at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused(model: Llama, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        lab.ablate(model, TEXT, **arguments)
    assert "\n" not in str(error.value)


def test_nan_ends_a_row_and_not_the_table(model: Llama) -> None:
    model.tok_embeddings.weight[TEXT[1, 7]] = 0  # with eps 0 its norm is 0/0
    joint = lab.ablate(model, TEXT, PRE, joint=True, eps=0.0)
    where = "first at layers.0.attention.pre_norm, token 7 of row 1"
    assert where in joint[0].error
    table = lab.ablate(model, TEXT, PRE, cumulative=True, eps=0.0)
    assert [row.error is None for row in table] == [True] * 5 + [False]
    assert table[-1].path == PATHS[0]
    assert where in table[-1].error


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["--joint", "keep=massive:1.5"], {"joint": True, "keep": {"massive": 1.5}}),
        (["--cumulative"], {"cumulative": True}),
        (["--in-order", "--calibrate", "OTHER"], {"cumulative": "given", "calibrate": True}),
        (["gain=dims:3,5"], {"gain": {"dims": [3, 5]}}),
        (['gain={"dims": [3, 5], "gain": ["scale", 2]}'], {"gain": {"dims": [3, 5], "gain": ["scale", 2]}}),
        (["kind=dyt", "alpha=0.7"], {"kind": "dyt", "alpha": 0.7}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_says_what_the_function_says(
    words: list[str], arguments: dict[str, Any], tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [tmp_path / "text.txt", tmp_path / "other.txt"]
    texts[0].write_text("It is one thing to say so, and another one")
    texts[1].write_text("Something else is here to read")
    words = [str(texts[1]) if word == "OTHER" else word for word in words]
    pattern = "layers.0.*.pre_norm,norm"
    settings, options = ([word for word in words if ("=" in word) is there] for there in (True, False))
    args = ["ablate", pattern, *settings, *options, "--model", str(tiny_dir), "--text", str(texts[0]), "--tokens", "20"]
    picture = [] if "--joint" in words else ["--picture", str(tmp_path / "a.svg")]
    assert main([*args, "--json", *picture]) == 0
    rows = json.loads(capsys.readouterr().out)
    ids, other = (Tokenizer.from_pretrained(tiny_dir).encode(path.read_text())[:20] for path in texts)
    if "calibrate" in arguments:
        arguments = arguments | {"calibrate": other}
    table = lab.ablate(Llama.from_pretrained(tiny_dir), ids, pattern, **arguments)
    assert [(row["path"], row["dloss"], row["se"]) for row in rows] == [(r.path, r.dloss, r.se) for r in table]
    assert main(args) == 0
    assert capsys.readouterr().out.splitlines()[-1] == table.note
    if picture:
        assert (tmp_path / "a.svg").read_bytes().startswith(b"<svg")


def test_help_lists_every_setting() -> None:
    words = SETTINGS_HELP.split()
    assert {word.partition("=")[0] for word in words if "=" in word} >= {*SETTINGS}
    text = SETTINGS_HELP.replace(",", " ").replace(";", " ").replace(":", " ").split()
    assert {*NORMS, *FREEZE, "first", "none", "massive", "ids", "scale", "dims", "mean", "one"} <= {
        word.rpartition("=")[2] for word in text
    }


def test_a_joint_cost_has_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--joint", "--picture", "a.svg"]) == 2
    assert "--joint gives one cost, and no picture: leave --picture out" in capsys.readouterr().err
