"""The lab on a tiny model of every family: it records, edits, moves, folds and checks, or refuses by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.errors import RequestError
from llama_mini.lab import (
    ablate,
    audit,
    capture,
    doctor,
    edited,
    fold,
    folded_gains,
    init,
    insert,
    move,
    norms,
    predict,
)
from llama_mini.lab.paths import readers, select
from llama_mini.model.llama import Llama
from llama_mini.model.norm import LayerNorm, Norm
from tests.oracles import same_bits
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens

BY_DEFAULT = ("gemma2", "nemotron", "cohere2", "olmo")  # the others are slow
TOKENS = random_tokens(1, 24)

pytestmark = [
    pytest.mark.parametrize(
        "model_type", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in FAMILIES]
    ),
    pytest.mark.filterwarnings("ignore:.*has no tokenizer"),
]


@pytest.fixture
def directory(model_type: str, tmp_path: Path) -> Path:
    random_model(model_type, 1).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def model(directory: Path) -> Llama:
    return Llama.from_pretrained(directory)


def test_capture_sees_every_norm_and_the_stream(model: Llama) -> None:
    recording = capture(model, TOKENS)
    assert list(recording) == select(model, None) == [row.path for row in norms(model)]
    stream = recording.resid
    assert len(stream.resid_pre) == len(stream.resid_mid) == len(stream.resid_post) == model.config.n_layers
    assert torch.equal(recording["norm"].x, stream.resid_post[-1].x)
    assert torch.equal(stream.resid_pre[0].x, model.embed_norm(model.embed(TOKENS)))
    for path, record in recording.items():
        assert same_bits(model.get_submodule(path)(record.x), record.y)


def test_ablate_changes_every_norm_or_says_why_not(model: Llama) -> None:
    rows = ablate(model, TOKENS, skip=True)
    assert [row.path for row in rows] == select(model, None)
    assert all(row.error is None and abs(row.kl) > 1e-9 for row in rows)
    if any(isinstance(module, LayerNorm) for module in model.modules()):
        with pytest.raises(RequestError, match="is of kind layer; freeze is for rms and scale"):
            ablate(model, TOKENS)
    else:
        assert all(row.error is None for row in ablate(model, TOKENS))


def test_move_there_and_back(model: Llama) -> None:
    plan = model.config.norm_plan
    slot = "pre" if plan.feed_forward.pre else "out"
    if plan.parallel:
        with pytest.raises(RequestError, match=r"layers\.0\.attention\.pre_norm is read by both branches"):
            move(model, "layers.*.attention.pre_norm", "post")
        return
    moved = move(model, f"layers.*.feed_forward.{slot}_norm", "post")
    assert (moved(TOKENS) - model(TOKENS)).abs().max() > 1e-3
    assert same_bits(move(moved, "layers.*.feed_forward.post_norm", slot)(TOKENS), model(TOKENS))


@pytest.mark.slow
def test_new_norms_and_edits_are_saved(model: Llama, tmp_path: Path) -> None:
    slot = "post" if model.config.norm_plan.layer(0)[1].mid is not None else "mid"
    new = insert(model, f"layers.*.feed_forward.{slot}_norm", TOKENS)
    new = edited(
        new, {"norm": {"freeze": "quadratic", "keep": "none"} if new.norm.kind == "rms" else {"eps": 0.1}}, TOKENS
    )
    new.save_pretrained(tmp_path / "new")
    again = Llama.from_pretrained(tmp_path / "new")
    assert again.config == new.config
    assert same_bits(again(TOKENS), new(TOKENS))
    assert (new(TOKENS) - model(TOKENS)).abs().max() > 1e-4


@pytest.mark.slow
def test_audit_and_folded_gains_name_every_norm(model: Llama) -> None:
    rows, gains = audit(model, TOKENS), folded_gains(model) if readable(model) else {}
    assert rows.column("path") == select(model, None)
    assert {row.path for row in rows if row.folds} <= gains.keys() <= {row.path for row in rows}
    assert all(row.error is None for row in rows)


def readable(model: Llama) -> bool:
    return any(readers(path, model.config) for path in select(model, None))


def test_fold_keeps_the_logits(model: Llama, model_type: str) -> None:
    if model_type == "olmo":
        with pytest.raises(RequestError, match="no norm of the model has a gain that can be folded"):
            fold(model)
        return
    folded, before = fold(model), model(TOKENS)
    assert (folded(TOKENS) - before).abs().max() < 5e-6 * before.abs().max()
    for path in [path for path in select(folded, None) if path.endswith(".pre_norm") or path == "norm"]:
        norm = folded.get_submodule(path)
        assert isinstance(norm, Norm)
        assert (norm.weight == (0 if norm.gain == "1+w" else 1)).all()


def test_doctor_finds_nothing_wrong(model: Llama, directory: Path) -> None:
    for findings in (doctor(model), doctor(directory)):
        wrong = [row for row in findings if "eps is" not in row.finding or "absent" in row.finding]
        assert not wrong, wrong  # a tiny model's eps may be unusual


def test_predict_knows_the_plan(model: Llama) -> None:
    config = model.config
    settings = {"activation": config.activation, "gated": config.gated_mlp}
    predicted, measured = (make(config.norm_plan, 4, **settings) for make in (predict, init))
    assert np.isfinite(predicted.gradient).all()
    off = measured.deviation(predicted)
    assert off["second_moment"] <= 0.05
    assert off["angle"] <= 0.05
    assert off["gradient"] <= 0.06
