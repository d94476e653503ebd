"""The copy that is trained: what it shares, how a change comes in slowly, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.lab import edit, fold, insert, move
from llama_mini.lab.students import Taper, as_wide, student_of, tapers_of, trained
from llama_mini.model.llama import Llama
from llama_mini.model.norm import RMSNorm
from llama_mini.model.norm_plan import NormPlan
from tests.oracles import same_bits
from tests.tiny_models import random_tokens, tiny_model

TOKENS = random_tokens(2, 17)


@pytest.mark.parametrize("plan", ["pre", "out+qk:full", "peri", "parallel"])
@pytest.mark.parametrize("settings", [{"kind": "layer"}, {"eps": 0.3}, {"gain": ("scale", 0.5)}, {"skip": True}])
def test_an_edit_becomes_a_plan(plan: str, settings: dict) -> None:
    model = as_wide(tiny_model(1, norm_plan=plan), {})
    with edit(model, {"layers.1.*.*": settings}):
        expected = model(TOKENS)
    student, first = student_of(model, {"layers.1.*.*": settings}, TOKENS)
    assert first == 1
    assert same_bits(student(TOKENS).detach(), expected)
    again = Llama(student.config)
    again.load_state_dict(student.state_dict())
    assert same_bits(again.eval()(TOKENS).detach(), expected)


def test_a_frozen_norm_becomes_a_plan_if_no_token_is_kept_apart() -> None:
    model = as_wide(tiny_model(1), {})
    for keep, kinds in (("none", {"rms", "frozen"}), ("first", {"rms"})):
        change = {"layers.1.*.pre_norm": {"freeze": "median", "keep": keep}}
        with edit(model, change, TOKENS):
            expected = model(TOKENS)
        student, first = student_of(model, change, TOKENS)
        assert first == 1
        assert same_bits(student(TOKENS).detach(), expected)
        branch, _ = student.config.norm_plan.layer(1)
        assert {branch.pre.kind, student.config.norm_plan.layer(0)[0].pre.kind} == kinds
        assert ("layers.1.attention.pre_norm.inverse_rms" in trained(student)) == (keep == "none")


def test_what_is_not_trained_is_shared_and_the_model_is_as_it_was() -> None:
    given = tiny_model(1).requires_grad_(True)
    model = as_wide(given, {})
    student, _ = student_of(model, move(model, "layers.2.*.pre_norm", "out"), TOKENS)
    of_given = {p.data_ptr() for p in given.parameters()}
    own = {name for name, p in student.named_parameters() if p.data_ptr() not in of_given}
    assert own == set(trained(student))
    assert "layers.2.attention.out_norm.weight" in own
    assert all(p.requires_grad for p in given.parameters())


def test_bfloat16_becomes_float32_and_stays_shared() -> None:
    model, made = tiny_model(1, torch.bfloat16), {}
    moved = move(model, "layers.2.*.pre_norm", "out")
    wide, changed = as_wide(model, made), as_wide(moved, made)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert changed.layers[2].attention.out_norm.weight is wide.layers[2].attention.pre_norm.weight


@pytest.fixture
def massive() -> Tensor:
    x = torch.from_numpy(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).numpy())
    return x * torch.tensor([[1.0], [1000.0], [0.02]])


def test_a_taper_goes_from_the_old_norm_to_the_new_one(massive: Tensor) -> None:
    old, new = RMSNorm(8, eps=0.0), torch.nn.Identity()
    taper = Taper(old, new)
    torch.testing.assert_close(taper(massive), old(massive))
    taper.share = 0.0
    assert same_bits(taper(massive), massive)
    for share in (0.75, 0.3):
        taper.share = share
        rms = massive.pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(taper(massive), massive / rms**share)


def test_a_taper_is_in_every_norm_that_differs() -> None:
    model = as_wide(tiny_model(1), {})
    moved, _ = student_of(model, move(model, "layers.2.attention.pre_norm", "out"), TOKENS)
    assert set(tapers_of(model, moved)) == {"layers.2.attention.pre_norm", "layers.2.attention.out_norm"}
    scaled, _ = student_of(model, {"layers.1.*.pre_norm": {"gain": ("scale", 2.0)}}, TOKENS)
    tapers = tapers_of(model, scaled)
    assert set(tapers) == {"layers.1.attention.pre_norm", "layers.1.feed_forward.pre_norm"}
    for path, taper in tapers.items():
        scaled.set_submodule(path, taper)
    torch.testing.assert_close(scaled(TOKENS), model(TOKENS))
    assert not [name for name in trained(scaled) if ".old." in name]


def test_changes_of_other_models_and_of_nothing_are_refused() -> None:
    model = as_wide(tiny_model(1), {})
    for change, message in (
        (tiny_model(1, max_seq_len=99, dim=36), "another dim, head_dim, max_seq_len, rotary_dim than the model"),
        (tiny_model(1), "leaves the model as it is"),
        ({"layers.1.*.pre_norm": {"eps": model.config.norm_eps}}, "leaves the model as it is"),
        ({"layers.7.*.pre_norm": {"eps": 1.0}}, "matches no norm"),
        ([], "edits must be a mapping"),
    ):
        with pytest.raises(RequestError, match=message):
            student_of(model, change, TOKENS)
    assert student_of(model, fold(model, "norm"), TOKENS)[1] == -1  # the head has changed
    grown = insert(model, "layers.1.attention.out_norm", TOKENS)
    assert student_of(model, grown, TOKENS)[1] == 1
    assert replace(grown.config, norm_plan=NormPlan()) == replace(model.config, norm_plan=NormPlan())
