"""edited: a new model that computes what the edit computes, and that the disk keeps; or a refusal by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_mini.errors import RequestError
from llama_mini.lab import edit, edited, fold, insert, move
from llama_mini.lab.__main__ import main
from llama_mini.model.llama import Llama
from llama_mini.model.norm import FrozenNorm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import NormSpec
from tests import reference
from tests.oracles import same_bits
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 17)
EDITS: dict[str, dict[str, dict[str, Any]]] = {
    "eps": {"layers.0-1.*.pre_norm": {"eps": 0.5}, "norm": {"eps": 1e-5}},
    "kind": {
        "layers.*.*.pre_norm": {"kind": "layer", "gain": "mean"},
        "norm": {"kind": "derf", "gain": ["scale", 2.0]},
    },
    "scale": {"layers.1.attention.*": {"kind": "scale", "cast": "late"}},
    "skip": {"layers.2.*.pre_norm,norm": {"skip": True}},
    "fill": {"layers.*.*.out_norm,embed_norm": {"kind": "rms", "gain": 0.7}},
    "frozen": {"layers.*.attention.pre_norm": {"freeze": "quadratic", "keep": "none", "gain": "one"}},
    "median": {"norm,layers.1.*.pre_norm": {"freeze": "median", "keep": "none"}},
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", EDITS)
def test_it_computes_what_the_edit_computes(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(1, dtype)
    before = model(TOKENS)
    with edit(model, EDITS[case], TOKENS):
        expected = model(TOKENS)
    new = edited(model, EDITS[case], TOKENS)
    found = new(TOKENS)
    assert (found - before).abs().max() > 1e-3
    if dtype is torch.float32:
        assert same_bits(found, expected)
    else:  # new gains and constants are rounded once more
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert same_bits(model(TOKENS), before)
    new.save_pretrained(tmp_path / "saved")
    again = Llama.from_pretrained(tmp_path / "saved")
    assert again.config == new.config
    assert same_bits(again(TOKENS), found)


def test_the_plan_says_what_was_edited_and_the_formula_holds() -> None:
    model = tiny_model(1)
    new = edited(model, EDITS["frozen"] | {"layers.0.feed_forward.pre_norm": {"skip": True}}, TOKENS)
    attention, feed_forward = new.config.norm_plan.layer(0)
    assert (attention.pre, feed_forward.pre) == (NormSpec(kind="frozen"), None)
    assert edited(model, {"norm": {"eps": 1e-5, "cast": "early"}}).config == model.config
    state = {name: tensor.double().numpy() for name, tensor in new.state_dict().items()}
    expected = reference.logits(new.config, state, TOKENS.numpy())
    np.testing.assert_allclose(new(TOKENS).numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_frozen_norm_is_edited_moved_folded_and_trained_on() -> None:
    new = edited(tiny_model(1), EDITS["frozen"], TOKENS)
    norm = new.layers[0].attention.pre_norm
    assert isinstance(norm, FrozenNorm)
    with edit(new, {"layers.0.attention.pre_norm": {"gain": ["scale", 2.0]}}):
        changed = new.layers[0].attention.pre_norm
        x = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, 48))).float()
        torch.testing.assert_close(changed(x), 2 * norm(x))
    moved = move(new, "layers.*.attention.pre_norm", "out")
    assert (
        moved.get_parameter("layers.2.attention.out_norm.inverse_rms") is new.layers[2].attention.pre_norm.inverse_rms
    )
    folded = fold(moved, "layers.*.feed_forward.pre_norm")
    torch.testing.assert_close(folded(TOKENS), moved(TOKENS), rtol=0, atol=1e-4)
    again = insert(folded, "layers.*.attention.q_norm", TOKENS, norm=NormSpec(kind="frozen"))
    torch.testing.assert_close(again(TOKENS), folded(TOKENS), rtol=0, atol=1e-5)  # g·x with g = 1 is x
    new.requires_grad_(True)
    new(TOKENS).square().mean().backward()
    assert norm.inverse_rms.grad is not None
    assert norm.inverse_rms.grad.abs() > 0


def test_groups_and_powers_stay_with_their_norms() -> None:
    plan = NormPlan.parse("pre", 3).with_norms(kind="group", groups=4)
    for settings in ({"kind": "group", "groups": 4}, {"kind": "power", "power": 0.5}):
        model = tiny_model(1, norm_plan=plan.with_norms(kind="rms", groups=1).with_norms(**settings))
        new = edited(model, {"layers.*.*.*": {"eps": 0.1}})
        assert new.config.norm_plan.attention.pre == NormSpec(eps=0.1, **settings)
        with edit(model, {"layers.*.*.*": {"eps": 0.1}}):
            assert same_bits(model(TOKENS), new(TOKENS))
    dyt = tiny_model(1, norm_plan=NormPlan.parse("pre", 3).with_norms(kind="derf"))
    shift = dyt.norm.shift
    assert edited(dyt, {"norm": {"gain": "one"}}).norm.shift is shift


@pytest.mark.parametrize("settings", [{"freeze": "quadratic"}, {"freeze": "token", "keep": "none"}])
def test_what_no_plan_can_express_is_refused_by_its_path(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"layers\.0\.attention\.pre_norm would be frozen .* no plan can express"):
        edited(tiny_model(1), {"layers.*.*.pre_norm": settings}, TOKENS)
    model = tiny_model(1)
    with edit(model, {"norm": {"eps": 0.1}}), pytest.raises(RequestError, match="leave the edit"):
        edited(model, {"norm": {"eps": 0.2}})


OWN_SETTINGS = {
    "group": {"kind": "group", "groups": 4},
    "power": {"kind": "power", "power": 0.5},
    "derf": {"kind": "derf", "alpha": 0.2},
}


@pytest.mark.parametrize("kind", OWN_SETTINGS)
def test_the_settings_that_a_kind_has_alone(kind: str) -> None:
    model = tiny_model(1)
    new = edited(model, {"norm": OWN_SETTINGS[kind]}).norm
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((5, 48)))
    settings = {name: value for name, value in OWN_SETTINGS[kind].items() if name != "kind"}
    if kind == "derf":
        settings |= {"shift": 0.0}
    normed = reference.normalised(x.numpy(), kind, model.config.norm_eps, **settings)
    np.testing.assert_allclose(new(x.float()).numpy(), normed * new.weight.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 2}, "'norm': norm would be of kind rms, which has no groups"),
        ({"kind": "dyt", "power": 0.5, "eps": 1}, "norm would be of kind dyt, which has no eps, power"),
        ({"kind": "frozen", "eps": 1e-3}, "norm would be of kind frozen, which has no eps"),
        ({"kind": "group", "groups": 5}, "which has 48 elements, not a multiple of 5 groups"),
        ({"kind": "group", "groups": 0}, "groups must be a whole number of at least 1, not 0"),
        ({"kind": "power", "power": "half"}, "power must be a finite number, not 'half'"),
    ],
)
def test_settings_of_other_kinds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        edited(tiny_model(1), {"norm": settings})


def test_the_command_saves_an_edit(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, options = ["edit", "layers.*.*.pre_norm", "freeze=quadratic"], ["--model", str(tiny_dir), "--tokens", "24"]
    saved = ["--save", str(tmp_path / "new")]
    assert main([*words, "keep=none", *options, "--json"]) == 0
    edit_alone = json.loads(capsys.readouterr().out)[1]
    assert main([*words, "keep=none", *options, "--json", *saved]) == 0
    assert json.loads(capsys.readouterr().out)[1] == edit_alone
    new = Llama.from_pretrained(tmp_path / "new")
    assert new.config.norm_plan.attention.pre == NormSpec(kind="frozen")
    assert main([*words, "keep=first", *options, "--save", str(tmp_path / "other")]) == 2
    assert "no plan can express" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main([*words, *options, *saved]) == 3
    assert "new exists already" in capsys.readouterr().err
