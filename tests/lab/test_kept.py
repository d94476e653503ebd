"""The state of a training on disk: what was stopped goes on bit for bit, and nothing else is taken for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_mini.errors import CheckpointFormatError, CheckpointPathError, RequestError
from llama_mini.lab import distillation, heal
from llama_mini.lab.distillation import Distillation
from llama_mini.lab.healing import Healed
from llama_mini.lab.kept import Kept
from llama_mini.model.llama import Llama
from tests.lab.test_healing import PATTERN, TEXTS, TOKENS, healed, same
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(1)


class Stop:
    """Ctrl-C in the middle of a step: the nth since the start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left, self.gradients = at, Distillation.gradients
        monkeypatch.setattr(Distillation, "gradients", lambda *args: self(*args))
        monkeypatch.setattr(distillation, "_KEEP_EVERY", -1)

    def __call__(self, *args: Any) -> float:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.gradients(*args)


def test_a_stopped_training_goes_on_bit_for_bit(
    model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, settings = healed(model, taper=True), {"taper": True, "folder": tmp_path / "state"}
    for at, name, done in ((4, "heal", 3), (4, "heal", 6), (7, "control", 4)):
        Stop(monkeypatch, at)
        with pytest.raises(KeyboardInterrupt):
            healed(model, **settings)
        monkeypatch.undo()
        assert (
            f"{name}: stopped after {done} of 8 steps; the same call goes on after step {done}"
            in capsys.readouterr().err
        )
    found = healed(model, **settings)
    assert same(found, expected)
    assert same(found.control, expected.control)
    Stop(monkeypatch, 1)  # nothing is left to train
    assert same(healed(model, **settings), expected)


def test_without_a_folder_ctrl_c_says_what_to_do(
    model: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Stop(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        healed(model, taper=False)
    assert (
        "heal: stopped after 2 of 8 steps; to be able to go on, name a folder (--folder DIR)" in capsys.readouterr().err
    )


def test_the_state_of_another_call_and_a_broken_one_are_refused(model: Llama, tmp_path: Path) -> None:
    healed(model, steps=1, control=False, folder=tmp_path)
    others: dict[str, Callable[[], Healed]] = {
        "seed": lambda: healed(model, steps=1, seed=5, folder=tmp_path),
        "budget": lambda: healed(model, steps=2, folder=tmp_path),
        "taper": lambda: healed(model, steps=1, taper=False, folder=tmp_path),
        "held-out text": lambda: healed(model, steps=1, held_out=TOKENS, folder=tmp_path),
        "text": lambda: healed(model, steps=1, text=TOKENS, folder=tmp_path),
        "change": lambda: heal(model, {PATTERN: {"eps": 1.0}}, steps=1, seed=1, **TEXTS, folder=tmp_path),
        "model, change": lambda: healed(tiny_model(2), steps=1, folder=tmp_path),
    }
    for name, call in others.items():
        with pytest.raises(RequestError, match=f"is of a training with another {name}: name a new folder"):
            call()
    (tmp_path / "heal.pt").write_bytes(b"no state")
    with pytest.raises(CheckpointFormatError, match=r"heal\.pt cannot be read .* remove it"):
        healed(model, steps=1, folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointPathError, match="cannot make the folder"):
        healed(model, steps=1, folder=tmp_path / "file")
    assert Kept(None, {}).load("heal") is None
