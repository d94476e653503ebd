"""heal: what it returns, that it repeats bit for bit, its control, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_mini.engine.llm import LLM
from llama_mini.errors import CapacityError, NumericalError, RequestError
from llama_mini.lab import heal, move, norms
from llama_mini.lab.distillation import Distillation
from llama_mini.lab.healing import Healed
from llama_mini.lab.students import Taper
from llama_mini.model.llama import Llama
from tests.oracles import same_bits
from tests.tiny_families import random_model
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 20)
TEXTS: dict[str, Any] = {"text": random_tokens(12, 20), "held_out": random_tokens(2, 24, seed=9)}
PATTERN = "layers.2.*.pre_norm"


def healed(model: Llama, **settings: Any) -> Healed:
    return heal(model, move(model, PATTERN, "out"), **{"steps": 8, "seed": 1} | TEXTS | settings)


def same(one: Healed, other: Healed) -> bool:
    """Whether two trainings agree bit for bit; their times differ."""
    curves = [[replace(point, seconds=0.0) for point in each.curve] for each in (one, other)]
    tensors = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return curves[0] == curves[1] and all(same_bits(a, b) for a, b in tensors)


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(1)


@pytest.fixture(scope="module")
def result(model: Llama) -> Healed:
    return healed(model)


def test_training_brings_the_model_closer_and_leaves_the_given_one(result: Healed, model: Llama) -> None:
    kls = result.curve.column("kl")
    assert kls == sorted(kls, reverse=True)
    assert (result.before, result.after) == (result.curve[0], result.curve[-1])
    assert result.curve.column("tokens") == [40 * step for step in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert (result.tokens, result.steps, result.tapered) == (320, 8, False)
    assert result.tokens_per_second == pytest.approx(320 / result.after.seconds)
    assert same_bits(model(TOKENS), tiny_model(1)(TOKENS))
    assert [row.path for row in norms(result.model)][-3:] == [
        "layers.2.attention.out_norm",
        "layers.2.feed_forward.out_norm",
        "norm",
    ]
    assert not any(p.requires_grad for p in result.model.parameters())


def test_the_control_costs_the_same_kl_and_is_trained_in_the_same_layers(result: Healed, model: Llama) -> None:
    control = result.control
    assert control.before.kl == pytest.approx(result.before.kl, rel=0.05)
    assert control.after.kl < control.before.kl
    assert control.model.config == model.config
    changed = {name for name, p in control.model.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert {name.split(".")[1] for name in changed if name.startswith("layers")} == {"2"}
    assert "layers.2.attention.q_proj.weight" in changed
    assert [row.run for row in result.table()] == ["change"] * 8 + ["control"] * 8
    assert "8 steps, 320 tokens" in repr(result)


def test_the_healed_model_is_saved_and_loaded(result: Healed, tmp_path: Path) -> None:
    result.model.save_pretrained(tmp_path / "saved")
    assert same_bits(Llama.from_pretrained(tmp_path / "saved")(TOKENS), result.model(TOKENS))


def test_same_seed_and_steps_same_bits(result: Healed, model: Llama) -> None:
    with torch.inference_mode():
        assert same(healed(model), result)
    other = healed(model, seed=2, control=False)
    assert not torch.equal(*(each.model.layers[2].attention.q_proj.weight for each in (other, result)))
    assert other.before.kl == result.before.kl


def test_minutes_fix_the_steps_once(model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distillation, "steps_in", lambda run, student, minutes: round(10 * minutes))
    found = healed(model, steps=None, minutes=0.5, control=False, folder=tmp_path)
    assert (found.steps, found.control) == (5, None)
    monkeypatch.setattr(Distillation, "steps_in", lambda *_: 1 / 0)
    assert same(healed(model, steps=None, minutes=0.5, control=False, folder=tmp_path), found)


def test_a_frozen_norm_is_healed_in_place(model: Llama) -> None:
    found = heal(model, {PATTERN: {"freeze": "quadratic", "keep": ["massive", {"ids": [5]}]}}, steps=8, **TEXTS)
    assert found.after.kl < found.before.kl
    assert torch.isfinite(found.model(TOKENS)).all()
    with pytest.raises(RequestError, match="is not what the model's config describes"):
        found.model.save_pretrained("nowhere")


def test_a_healed_model_with_frozen_norms_is_saved(model: Llama, tmp_path: Path) -> None:
    found = heal(model, {PATTERN: {"freeze": "quadratic", "keep": "none"}}, steps=2, control=False, **TEXTS)
    found.model.save_pretrained(tmp_path / "saved")
    assert same_bits(Llama.from_pretrained(tmp_path / "saved")(TOKENS), found.model(TOKENS))


def test_a_change_that_is_not_finite_comes_in_slowly_or_is_given_up(model: Llama) -> None:
    overflow = {PATTERN: {"gain": 1e38}}
    with pytest.raises(NumericalError, match=r"heal: in step \d of 8 the KL is .*; it cannot be trained"):
        heal(model, overflow, steps=8, **TEXTS)
    with pytest.raises(NumericalError, match=r"in step 1 of 8 the KL is nan .*; try taper"):
        heal(model, overflow, steps=8, taper=False, **TEXTS)


def test_gradients_that_are_not_finite_bring_the_change_in_slowly(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, kls = Distillation.gradients, iter([float("nan")])
    monkeypatch.setattr(Distillation, "gradients", lambda *args: next(kls, None) or gradients(*args))
    found = healed(model, control=False)
    assert found.tapered
    assert not any(isinstance(part, Taper) for part in found.model.modules())
    assert not healed(model, control=False).tapered


def test_no_control_where_no_noise_costs_as_much(model: Llama) -> None:
    with pytest.warns(UserWarning, match="no control: no noise"):
        found = heal(model, {"norm": {"gain": ("scale", 40.0)}}, steps=2, **TEXTS)
    assert found.control is None


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "qwen3"))]
)
@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_other_families(model_type: str, tmp_path: Path) -> None:
    random_model(model_type, 1).save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path)
    slot = "pre" if model_type == "qwen3" else "out"
    for change in (
        move(model, f"layers.1-2.feed_forward.{slot}_norm", "post"),
        {f"layers.1-2.*.{slot}_norm": {"kind": "layer"}},
    ):
        found = heal(model, change, steps=6, text=TEXTS["text"], held_out=TEXTS["text"][:2], control=False)
        assert found.after.kl < found.before.kl


def test_without_texts_the_model_writes_them(model: Llama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    short = tiny_model(1, max_seq_len=16)
    found = heal(short, {PATTERN: {"kind": "layer"}}, steps=2, control=False)
    assert found.tokens == 2 * 2 * 16
    assert len(list((tmp_path / "llama_mini" / "samples").iterdir())) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0}, "minutes must be a finite number above 0"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"taper": "no"}, "taper must be true or false"),
        ({"control": 1}, "control must be true or false"),
        ({"text": [1]}, "at least 2"),
        ({"held_out": [[1, 97]]}, "token id 97 is outside"),
    ],
)
def test_nonsense_is_refused(settings: dict, message: str, model: Llama) -> None:
    with pytest.raises(RequestError, match=message):
        healed(model, **settings)


def test_optimised_models_and_too_little_memory_are_refused_by_name(
    model: Llama, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = LLM(tiny_dir, quantize="int8").model
    with pytest.raises(RequestError, match="is not what the model's config describes"):
        heal(fast, {PATTERN: {"eps": 1.0}}, steps=1, **TEXTS)
    monkeypatch.setattr("llama_mini.lab.healing.available_memory", lambda device: 10_000)
    with pytest.raises(CapacityError, match=r"the training needs .* from layer 2 on, but cpu has 0\.0 MiB"):
        healed(model)
