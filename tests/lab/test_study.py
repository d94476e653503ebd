"""Plans as JSON and from files, in every function and command that takes a plan; settings of the commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_mini.errors import CheckpointPathError, LlamaMiniError, RequestError
from llama_mini.lab import init, predict, race, sweep
from llama_mini.lab.__main__ import main
from llama_mini.model.norm_plan import NormPlan

PLAN = NormPlan.parse("peri+qk", 2)
TEXT = json.dumps(PLAN.to_dict())


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "my plan.json").write_text(TEXT)
    return str(tmp_path / "my plan.json")


def test_a_plan_as_json_and_in_a_file_is_the_plan(file: str) -> None:
    for given in (TEXT, f" {TEXT}", file):
        predicted, measured = predict(given, 2), init(given, 2, dim=16, seeds=1)
        np.testing.assert_array_equal(predicted.gradient, predict(PLAN, 2).gradient)
        np.testing.assert_array_equal(measured.second_moment, init("peri+qk", 2, dim=16, seeds=1).second_moment)
        assert predicted.plan == measured.plan == given
    swept = sweep([file, PLAN, "pre", file], depths=[1, 2], dim=8, seeds=1)
    assert [*swept.last_down] == [file, PLAN, "pre"]
    np.testing.assert_array_equal(swept.last_down[file], swept.last_down[PLAN])
    assert (swept.last_down[file] != swept.last_down["pre"]).all()
    losses = race([TEXT, "peri+qk"], steps=2, seeds=1, depth=1, dim=8).loss
    np.testing.assert_array_equal(losses[TEXT], losses["peri+qk"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the plan '{': is not JSON: "),
        ('{"attention": {"before": {}}}', "before"),
        ('{"attn": {}}', "attn"),
    ],
)
def test_json_that_is_no_plan_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        predict(text, 2)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(LlamaMiniError, match=r"bad\.json.*"):
        sweep(["pre", str(tmp_path / "bad.json")], depths=[1, 10**3], dim=16384)  # before the work


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointPathError, match=r"no/such\.json"):
        predict("no/such.json", 2)


def rows(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_commands_take_plans_as_json_and_the_settings(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(["predict", TEXT, "--depth", "2"], capsys) == rows(["predict", file, "--depth", "2"], capsys)
    swept = rows(["sweep", "pre", file, "--depths", "2", "3", "--dim", "16", "--seeds", "2"], capsys)
    slopes = sweep(["pre", file], depths=[2, 3], dim=16, seeds=2).table()
    assert swept == [vars(row) for row in slopes]
    settings = {"steps": 3, "depth": 2, "dim": 16, "seeds": 2, "warmup_steps": 2}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    races = [race("pre", learning_rate=rate, **settings).final["pre"] for rate in (1e-3, 1e-2)]
    assert rows(["race", "pre", *words, "--learning-rate", "1e-3", "1e-2"], capsys) == [vars(row) for row in races]
    assert races[0].final != races[1].final
    assert min(row.spread for row in races) > 0


def test_a_learning_rate_that_is_none_is_refused_before_the_first_race(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race", "--steps", "1000000", "--learning-rate", "1e-3", "-1"]) == 2
    assert "learning_rate must be a finite number above 0, not -1.0" in capsys.readouterr().err
