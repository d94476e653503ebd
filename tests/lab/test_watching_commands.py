"""The commands that show what flows through a checkpoint, and two checkpoints side by side."""

import json
from pathlib import Path

import pytest

from llama_mini.lab import massive_activations, recording
from tests.lab.test_commands import TEXT, out


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
