"""The server under load for some seconds; scripts/soak.py takes minutes."""

from pathlib import Path

import pytest

import soak


@pytest.mark.slow
def test_every_answer_is_what_it_is_alone(capsys: pytest.CaptureFixture[str], tiny_dir: Path) -> None:
    code = soak.main(["--seconds", "10", "--model", str(tiny_dir), "--dtype", "bfloat16", "--threads", "1"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "left: " in out
    assert "wrong: " in out


@pytest.mark.slow
def test_another_answer_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dir: Path
) -> None:
    ask = soak.Soak._text

    async def without_end(self: soak.Soak, body: dict[str, object]) -> str:
        return (await ask(self, body))[: None if "stream" not in body else -1]  # those that are asked alone are whole

    monkeypatch.setattr(soak.Soak, "_text", without_end)
    code = soak.main(["--seconds", "10", "--model", str(tiny_dir), "--dtype", "bfloat16", "--threads", "1"])
    assert code == 1
    assert " among others, and alone " in capsys.readouterr().err
