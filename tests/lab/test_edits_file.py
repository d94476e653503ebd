"""--edit FILE: generate, score and lm-eval with edited norms give what lab.edit gives, or refuse by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_mini import LLM, lab
from llama_mini.eval.perplexity import compare
from llama_mini.generate import main as generate
from llama_mini.lab.training import sample_text
from llama_mini.score import main as score

EDITS: dict[str, dict[str, Any]] = {
    "layers.0-1.*.pre_norm": {"gain": ["scale", -1.5], "kind": "layer"},
    "norm": {"eps": 0.5},
}
FROZEN = {"layers.*.*.pre_norm": {"freeze": "quadratic", "keep": "none"}}
PROMPT = "The Rabbit ran, and Alice"


@pytest.fixture
def llm(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, dtype="float32")


def write(folder: Path, edits: Any) -> Path:
    file = folder / "edits.json"
    file.write_text(json.dumps(edits), encoding="utf-8")
    return file


@pytest.mark.parametrize("edits", [EDITS, FROZEN], ids=["settings", "frozen"])
def test_generate_continues_as_the_edited_model_does(
    edits: dict[str, Any], llm: LLM, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = llm.generate(PROMPT, max_tokens=12)[0].token_ids
    with lab.edit(llm.model, edits, llm.tokenizer.encode(sample_text())[:256]):
        expected = llm.generate(PROMPT, max_tokens=12)[0].token_ids
    assert expected != plain
    words = ["--model", str(tiny_dir), "--dtype", "float32", "--raw", "--max-tokens", "12", "--json"]
    assert generate([*words, "--edit", str(write(tmp_path, edits)), PROMPT]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected
    assert llm.generate(PROMPT, max_tokens=12)[0].token_ids == plain  # what was edited is as it was


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_score_judges_the_edited_model_against_the_unedited(
    quantize: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text()[:300], encoding="utf-8")
    file, llm = write(tmp_path, EDITS), LLM(tiny_dir, dtype="float32", quantize=quantize)
    ids, reference = llm.tokenizer.encode(sample_text()[:300]), LLM(tiny_dir, dtype="float32")
    with lab.edit(llm.model, EDITS):
        expected = compare(llm, reference, ids)
    assert expected.model.nll > expected.reference.nll + 0.01
    words = [str(text), "--model", str(tiny_dir), "--dtype", "float32", "--quantize", quantize, "--edit", str(file)]
    assert score([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nll"] == pytest.approx(expected.model.nll, abs=1e-6)
    assert found["format"].endswith(f", edited by {file}")
    assert score([*words, "--against", str(tiny_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["reference"]["nll"] == pytest.approx(expected.reference.nll, abs=1e-6)
    assert found["against"]["kl_mean"] == pytest.approx(expected.kl_mean, rel=1e-4)


def test_a_batch_with_other_edits_does_not_resume_this_one(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, file = tmp_path / "prompts.jsonl", write(tmp_path, EDITS)
    prompts.write_text('{"prompt": "Alice"}\n', encoding="utf-8")
    words = ["--batch", str(prompts), "--model", str(tiny_dir), "--raw", "--max-tokens", "3", "--edit", str(file)]
    assert generate(words) == 0
    assert generate(words) == 0  # nothing is left to do
    write(tmp_path, {"norm": {"eps": 0.25}})
    assert generate(words) == 2
    assert "edit" in capsys.readouterr().err


REFUSALS: list[tuple[Any, int, str]] = [
    ([1], 3, "edits.json holds a JSON list, not an object"),
    ({"layers.9.*.pre_norm": {"eps": 1}}, 2, "edits.json: 'layers.9.*.pre_norm' matches no norm"),
    ({"norm": {"epsilon": 1}}, 2, "edits.json: 'norm': unknown setting 'epsilon'; known: eps"),
    ({"norm": 3}, 2, "edits.json: 'norm': expected settings such as"),
]


@pytest.mark.parametrize(("edits", "code", "message"), REFUSALS, ids=["list", "pattern", "setting", "number"])
def test_refusals_name_the_file(
    edits: Any, code: int, message: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(["--model", str(tiny_dir), "--edit", str(write(tmp_path, edits)), "Alice"]) == code
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert message in error


def test_a_file_that_is_not_there_and_a_checkpoint_that_is_only_described(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, code, message in (
        (["Alice"], 3, "no.json: No such file"),
        (["--info"], 2, "--info and --edit cannot be used together"),
    ):
        assert generate(["--model", str(tiny_dir), "--edit", str(tmp_path / "no.json"), *words]) == code
        assert message in capsys.readouterr().err
