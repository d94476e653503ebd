"""Every command that reads a checkpoint, on Gemma 3, OLMo 2, Qwen3 and four-bit weights: finite numbers, or a refusal
by name. What is saved opens again, with the loss that was printed."""

import json
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_mini import generate, score
from llama_mini.lab import training
from llama_mini.lab.__main__ import main
from tests.checkpoint.quantized.test_mlx import quantized
from tests.checkpoint.quantized.writers import write_model
from tests.tiny_families import random_model

TINY = Path(__file__).parents[1] / "tiny"
MODELS = ["gemma3_text", "olmo2", "qwen3", "int4"]
EMPTY = {"error", "kept", "cancels", "folds", "peak_row", "gain_change"}  # columns that may have no value
OF_BASE = {"dloss", "se", "kl", "top1"}  # that the row of the unchanged model does not have
TEXT = ["--tokens", "24"]
CASES = {  # name -> words; NEW is a folder to save to, PICTURE a file, MODEL the checkpoint
    "norms": "norms --json --picture PICTURE",
    "norms --folded": "norms --folded --json --picture PICTURE",
    "doctor": "doctor --json",
    "capture": "capture --json --picture PICTURE",
    "capture --massive": "capture --massive --json",
    "attention": "attention --json --picture PICTURE",
    "gradients": "gradients --json --picture PICTURE",
    "ablate": "ablate --json --picture PICTURE",
    "ablate keep": "ablate freeze=arithmetic keep=massive:1.1+0,5+ids:1 --calibrate TEXT --json",
    "ablate --joint": "ablate freeze=median keep=none --joint --json",
    "ablate --cumulative": "ablate layers.0.*.* --cumulative --json --picture PICTURE",
    "ablate --in-order": "ablate layers.0.*.*,layers.1.*.*,norm skip=true --in-order --json",
    "edit": "edit norm,layers.1.*.* eps=0.01 gain=scale:1.5 cast=late --json --save NEW",
    "edit frozen": "edit freeze=quadratic keep=none --json --save NEW",
    "edit kept": "edit freeze=quadratic --json --save NEW",
    "edit skip": "edit layers.2.*.* skip=true --json --save NEW",
    "edit group": "edit norm kind=group groups=4 gain=dims:3,5 --json --save NEW",
    "edit derf": "edit layers.*.*.* kind=derf alpha=0.7 --json --save NEW",
    "edit power": "edit layers.1.*.* kind=power power=0.5 --json --save NEW",
    "edit no alpha": "edit norm alpha=0.7 --json",
    "skip": "skip --json --picture PICTURE",
    "audit": "audit --json",
    "move": "move --json --save NEW",
    "move --fit": "move layers.*.attention.pre_norm --fit --to post --json --save NEW",
    "insert": "insert --json --save NEW",
    "insert qk": "insert layers.*.attention.q_norm,layers.*.attention.k_norm --json --save NEW",
    "insert mid": """insert layers.*.*.mid_norm --norm {"kind":"layer"} --json --save NEW""",
    "fold": "fold --json --save NEW",
    "heal": "heal --steps 2 --train TEXT --no-control --json --picture PICTURE --save NEW",
    "heal edit": "heal freeze=median keep=none --steps 2 --train TEXT --no-control --json --save NEW",
    "compare": "compare MODEL MODEL --json --picture PICTURE",
    "report": "report PAGE",
    "tour": "tour --lang ko --json",
}
TAKEN = "layers.0.{} holds a norm already"
EMPTY_SLOT = "'{}' matches only empty slots, such as layers.0."
REFUSED = {
    ("gemma3_text", "move"): "layers.0.feed_forward.out_norm is taken",
    ("gemma3_text", "heal"): "layers.2.feed_forward.out_norm is taken",
    ("gemma3_text", "insert"): TAKEN.format("attention.out_norm"),
    ("gemma3_text", "insert qk"): TAKEN.format("attention.q_norm"),
    ("olmo2", "insert"): TAKEN.format("attention.out_norm"),
    ("olmo2", "insert qk"): TAKEN.format("attention.q_norm"),
    ("olmo2", "move"): EMPTY_SLOT.format("layers.*.feed_forward.pre_norm"),
    ("olmo2", "move --fit"): EMPTY_SLOT.format("layers.*.attention.pre_norm"),
    ("olmo2", "heal"): "'layers.2-2.feed_forward.pre_norm' matches only empty slots, such as layers.2.",
    ("olmo2", "heal edit"): "'layers.2-2.feed_forward.pre_norm' matches only empty slots, such as layers.2.",
    ("olmo2", "tour"): "the tour looks at layers.1.feed_forward.pre_norm, which is not an RMSNorm with a gain",
    ("qwen3", "insert qk"): TAKEN.format("attention.q_norm"),
    **{(model, "edit no alpha"): "norm would be of kind rms, which has no alpha" for model in MODELS},
    **{(model, "edit kept"): "would be frozen with tokens kept apart" for model in MODELS},
}


@pytest.fixture(
    scope="module", params=[MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])]
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "int4":
        settings = {"quantization": {"group_size": 32, "bits": 4}}
        write_model(folder, settings, lambda _, weight: quantized(weight, 4, 32, "float16"), vocab_size=260)
    else:
        random_model(request.param, seed=1, vocab_size=260).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return request.param, folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return {
        "TEXT": str(text),
        **{word: str(tmp_path / name) for word, name in (("NEW", "new"), ("PICTURE", "a.svg"), ("PAGE", "a.html"))},
    }


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if name in ("report", "compare") else []) for name in CASES]
)
def test_it_prints_numbers_or_refuses_by_name(
    case: str,
    family: tuple[str, Path],
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "race", partial(training.race, steps=1, seeds=1))  # of the report
    name, folder = family
    command, *words = (({"MODEL": str(folder)} | files).get(word, word) for word in CASES[case].split())
    words += [] if command == "compare" else ["--model", str(folder)]
    words += [] if command in ("norms", "tour") else TEXT
    code = main([command, *words])
    out, error = capsys.readouterr()
    error = "\n".join(line for line in error.splitlines() if line.startswith(("error: ", "Traceback")))
    if message := REFUSED.get((name, case)):
        assert (code, out, error.count("\n")) == (2, "", 0)
        assert message in error
        assert not Path(files["NEW"]).exists()
        return
    assert (code, error) == (0, "")
    assert all(Path(files[word]).exists() for word in files if files[word] in words)
    if command == "report":
        return
    found = json.loads(out)
    for path, value in numbers(found):
        assert value is not None or path in EMPTY | OF_BASE, (path, value)
        assert not isinstance(value, float) or math.isfinite(value)
    if files["NEW"] in words:
        reopened = main(["edit", "norm,layers.*.*.*", "gain=scale:1", "--json", "--model", files["NEW"], *TEXT])
        assert reopened == 0
        loss = json.loads(capsys.readouterr().out)[0]["loss"]
        if command != "heal":
            assert loss == pytest.approx(found[1]["loss"], abs=1e-5)
            assert case == "fold" or found[1]["kl"] > 1e-7
        if command == "edit":  # the new model, and this one while it is edited
            assert main([command, *(word for word in words if word not in ("--save", files["NEW"]))]) == 0
            assert json.loads(capsys.readouterr().out)[1]["dloss"] == pytest.approx(found[1]["dloss"], abs=1e-5)


def numbers(found: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a JSON document, with the names of their columns."""
    match found:
        case dict():
            for key, value in found.items():
                yield from numbers(value, key)
        case list():
            for value in found:
                yield from numbers(value, name)
        case _:
            yield name, found


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_edits_are_carried_into_generate_and_score(
    quantize: str, family: tuple[str, Path], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = tmp_path / "edits.json"
    edits.write_text(json.dumps({"layers.0-1.*.*": {"freeze": "median", "keep": "massive"}, "norm": {"kind": "layer"}}))
    words = ["--model", str(family[1]), "--quantize", quantize, "--json"]
    losses = []
    for edited in ([], ["--edit", str(edits)]):
        assert score.main([files["TEXT"], *words, *edited]) == 0
        losses.append(json.loads(capsys.readouterr().out)["nll"])
        assert generate.main(["--raw", "--max-tokens", "3", *words, *edited, "The"]) == 0
        assert len(json.loads(capsys.readouterr().out)["token_ids"]) <= 3
    assert all(map(math.isfinite, losses))
    assert abs(losses[1] - losses[0]) > 1e-3
