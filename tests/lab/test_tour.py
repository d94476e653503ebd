"""The tour computes its numbers on the default checkpoint, in words of the language that is asked for."""

import json
import re
from pathlib import Path

import pytest

from llama_mini import Llama
from llama_mini.lab import commands
from llama_mini.tokenizer import Tokenizer
from tests.lab.test_commands import out


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> tuple[Llama, Tokenizer]:
    return Llama.from_pretrained(smollm2_dir, "float32"), Tokenizer.from_pretrained(smollm2_dir)


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_tour_counts_on_real_activations(
    smollm2: tuple[Llama, Tokenizer],
    language: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "read_model", lambda _: smollm2)
    steps = json.loads(out(["tour", "--lang", language, "--json", "--model", "smollm2"], capsys))
    assert [step["title"][0] for step in steps] == list("12345678")
    numbers = {step["title"][0]: "\n".join(step["numbers"]) for step in steps}
    assert "(10, 576)" in numbers["1"]
    assert numbers["2"].count("fails" if language == "en" else "나눌 수 없음") == 2
    assert "0.3015" in numbers["5"]  # at an RMS of 0.001 and eps 1e-5: 1/√(1 + 10)
    (share,) = re.findall(r"(\d+) %", numbers["7"])
    assert 20 < int(share) < 30  # 25.9 % with random gains
    everything = "\n".join(f"{step['title']} {step['text']}\n{numbers[step['title'][0]]}" for step in steps)
    assert any("가" <= char <= "힣" for char in everything) is (language == "ko")
    for step in steps if language == "ko" else []:
        names = r"(?<![A-Za-z])(mean\(.*?\)|b?float(16|32)|inf|nan|RMS|r?sqrt|eps)(?![A-Za-z])"
        words = re.findall("[A-Za-z]{2,}", re.sub(names, "", numbers[step["title"][0]]))
        assert not words, words
