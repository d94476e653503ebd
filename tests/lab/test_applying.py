"""edited: a new model that computes what the edit computes, and that the disk keeps; or a refusal by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_mini.errors import RequestError
from llama_mini.lab import edit, edited, fold, insert, move
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
