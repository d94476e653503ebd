"""Edits are undone whatever happens, and refuse what they cannot do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_mini import Llama, lab
from llama_mini.errors import RequestError
from llama_mini.lab.editing import Frozen, edited_norms
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(2, 23)
PATH = "layers.1.feed_forward.pre_norm"
KEPT: list[Any] = ["none", "first", {"massive": 1.1}, [3, 21], {"ids": TEXT[0, 19:22].tolist()}]
KINDS = NormPlan(
    attention=BranchPlan(pre=NormSpec()),
    feed_forward=BranchPlan(pre=NormSpec(kind="dyt")),
    final=NormSpec(kind="layer"),
)


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_as_before(model: Llama, before: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert n_hooks(model) == 0
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"kind": "layer"}, {"skip": True}, {"freeze": "token"}])
def test_an_edit_is_undone(settings: dict[str, Any]) -> None:
    model = tiny_model(norm_plan="peri")
    before, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    logits = model(TEXT)
    with lab.edit(model, {"layers.*.*.pre_norm": settings}, TEXT):
        assert not isinstance(model.get_submodule(PATH), type(before[PATH])) or model.get_submodule(PATH).kind != "rms"
    assert_as_before(model, before, state)
    with pytest.raises(KeyError, match="inside"), lab.edit(model, {"layers.*.*.pre_norm": settings}, TEXT):  # noqa: PT012
        model(TEXT)
        raise KeyError("inside")
    assert_as_before(model, before, state)
    with pytest.raises(RequestError, match="norn"), lab.edit(model, {PATH: settings, "norn": settings}, TEXT):
        pass
    assert_as_before(model, before, state)
    assert torch.equal(model(TEXT), logits)


def test_a_measurement_that_fails_leaves_no_hooks() -> None:
    model = tiny_model()
    model.norm.dim = 5
    with pytest.raises(ValueError, match="over 5 elements"), lab.edit(model, {PATH: {"freeze": "quadratic"}}, TEXT):
        pass
    assert n_hooks(model) == 0


def test_nested_edits_undo_in_order() -> None:
    model = tiny_model()
    own = model.get_submodule(PATH)
    with lab.edit(model, {PATH: {"eps": 0.5}}):
        outer = model.get_submodule(PATH)
        with lab.edit(model, {"layers.1.*.pre_norm": {"gain": ("scale", 2.0)}}):
            inner = model.get_submodule(PATH)
            assert (inner.eps, outer.eps) == (0.5, 0.5)
            torch.testing.assert_close(inner.weight, 2 * own.weight, rtol=0, atol=0)
        assert model.get_submodule(PATH) is outer
        with lab.edit(model, {PATH: {"skip": True}}):
            assert type(model.get_submodule(PATH)) is nn.Identity
    assert model.get_submodule(PATH) is own


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 0.5},
        {"kind": "layer"},
        {"cast": "late"},
        {"gain": ("scale", 2.0)},
        {"skip": True},
        {"freeze": "quadratic"},
    ],
    ids=str,
)
def test_an_edited_model_is_not_saved_as_if_it_were_plain(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    ways: list[Callable[[Llama], Any]] = [
        lambda model: model.save_pretrained(tmp_path / "edited"),
        lambda model: lab.move(model, "layers.0.attention.pre_norm", "out"),
        lambda model: lab.fold(model),
        lambda model: lab.center(model),
    ]

    def assert_refused(model: Llama, by: int = 1) -> None:
        for way in ways[:by]:
            with pytest.raises(RequestError, match=rf"^{PATH} is not what .* describes .*: leave the edit") as refused:
                way(model)
            assert "\n" not in str(refused.value)

    with lab.edit(model, {PATH: settings}, TEXT):
        assert_refused(model, by=len(ways))
        with lab.edit(model, {"norm": {"skip": True}}):
            assert_refused(model)
        assert_refused(model)
        copied = copy.deepcopy(model)
        logits = model(TEXT)
    assert torch.equal(copied(TEXT), logits)  # the copy keeps the edit
    assert_refused(copied)
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(Llama.from_pretrained(tmp_path / "plain")(TEXT), model(TEXT))
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_an_edit_that_changes_nothing_is_no_reason_not_to_save(tmp_path: Path) -> None:
    model = tiny_model()
    with lab.edit(model, {PATH: {"skip": False}}):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(Llama.from_pretrained(tmp_path / "saved")(TEXT), model(TEXT))


def test_inside_inference_mode_and_while_training() -> None:
    model = tiny_model()
    with torch.inference_mode(), lab.edit(model, {PATH: {"freeze": "quadratic", "gain": 2.0}}, TEXT):
        expected = model(TEXT).clone()
    model.requires_grad_(True)
    with lab.edit(model, {PATH: {"freeze": "quadratic", "gain": 2.0}}, TEXT):
        logits = model(TEXT)
        logits.square().mean().backward()
    assert torch.equal(logits, expected)
    assert model.layers[0].attention.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "settings",
    [{"freeze": "token", "keep": "none"}, *({"freeze": "quadratic", "keep": keep} for keep in KEPT)],
    ids=str,
)
def test_a_text_may_be_read_in_parts(settings: dict[str, Any]) -> None:
    """A frozen norm knows the tokens, and their positions after those that a cache holds."""
    model = tiny_model()
    plain = model(TEXT)
    with lab.edit(model, {PATH: settings}, TEXT):
        cache, whole = model.new_cache(2, 30), model(TEXT)
        first, rest = model(TEXT[:, :20], cache), model(TEXT[:, 20:], cache)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=0, atol=1e-5)
    if settings["freeze"] != "token":
        assert (plain - whole).abs().max() > 1e-3
    if settings["keep"] != "none":
        with lab.edit(model, {PATH: settings | {"keep": "none"}}, TEXT):
            assert (model(TEXT)[:, 20:] - whole[:, 20:]).abs().max() > 1e-4


def test_a_text_that_was_not_measured_is_refused() -> None:
    model = tiny_model()
    with lab.edit(model, {PATH: {"freeze": "token"}}, TEXT):
        with pytest.raises(RequestError, match="measured on 2 texts of 23 tokens and reads 2 of 24"):
            model(random_tokens(2, 24))
        with pytest.raises(RequestError, match="measured on 2 texts of 23 tokens and reads 1 of 9"):
            model(random_tokens(1, 9))
        model(random_tokens(2, 9))
    with lab.edit(model, {PATH: {"freeze": "token"}}, TEXT[0]):
        model(TEXT)


NAME = r"'layers.1.\*.pre_norm'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected settings such as"),
        (None, "expected settings such as dict\\(eps=1e-6\\), found None"),
        ({"epsilon": 1}, "unknown setting 'epsilon'; known: eps, kind, gain, alpha, groups, power, cast, freeze"),
        ({3: 1}, "unknown setting 3"),
        ({"eps": -1e-6}, "eps must be a finite number of at least 0, not -1e-06"),
        ({"eps": float("nan")}, "eps must be"),
        ({"eps": "1e-6"}, "eps must be"),
        ({"eps": None}, "eps must be"),
        ({"eps": True}, "eps must be"),
        ({"kind": "none"}, "unknown kind 'none'; known: rms, layer, .*skip=True leaves a norm out"),
        ({"kind": "batch"}, "unknown kind 'batch'"),
        ({"kind": ["rms"]}, "unknown kind"),
        ({"gain": "two"}, r"gain must be a number, \('scale', number\), 'mean', 'one', a list of .*, not 'two'"),
        ({"gain": ("scale", "2")}, "gain must be a number"),
        ({"gain": ("scale", float("inf"))}, "gain must be a number"),
        ({"gain": ("add", 2)}, "gain must be a number"),
        ({"gain": True}, "gain must be a number"),
        ({"gain": torch.ones(47)}, "would be of kind rms, which has 48 gains, not 47: give as many numbers"),
        ({"gain": torch.full((48,), torch.nan)}, "gain must be a number"),
        ({"gain": torch.ones(2, 24)}, "gain must be a number"),
        ({"gain": []}, "gain must be a number"),
        ({"gain": {"dims": []}}, "gain must be a number"),
        ({"gain": {"dims": [-1]}}, "gain must be a number"),
        ({"gain": {"dims": [1], "to": 3}}, "gain must be a number"),
        ({"gain": {"dims": [1], "gain": [1.0, 2.0]}}, "gain must be a number"),
        (
            {"gain": {"dims": [3, 48]}},
            "which has 48 gains, and no dimension 48; the first one is 0",
        ),
        ({"gain": {"dims": [3]}, "kind": "scale"}, "would be of kind scale, which has 1 gains, and no dimension 3"),
        ({"alpha": 0.3}, "would be of kind rms, which has no alpha"),
        ({"alpha": "0.3", "kind": "dyt"}, "alpha must be a finite number"),
        ({"freeze": "quadratic", "alpha": 0.3}, "which has no alpha"),
        ({"cast": "middle"}, "unknown cast 'middle'; known: early, late"),
        ({"cast": torch.ones(2)}, "unknown cast"),
        ({"freeze": "text"}, "unknown freeze 'text'; known: quadratic, arithmetic, median, token"),
        ({"freeze": "quadratic", "keep": True}, "unknown keep True; known: none, first, massive, a list"),
        ({"freeze": "mean"}, "unknown freeze 'mean'"),
        ({"skip": "yes"}, "skip must be true or false"),
        ({"keep": "first"}, "keep needs freeze: give both"),
        ({"skip": True, "eps": 1e-3}, "with skip, eps would change nothing"),
        ({"skip": True, "freeze": "quadratic"}, "with skip, freeze would change nothing"),
        ({"freeze": "quadratic", "eps": 1e-3}, "with freeze, eps would change nothing"),
        ({"freeze": "quadratic", "kind": "rms"}, "with freeze, kind would change nothing"),
        ({"freeze": "quadratic"}, "freeze needs ids"),
        ({"kind": "dyt", "eps": 1e-3}, "would be of kind dyt, which has no eps"),
    ],
)
def test_wrong_settings_are_refused_by_pattern(settings: Any, message: str) -> None:
    model = tiny_model()
    with (
        pytest.raises(RequestError, match=f"{NAME}.*{message}") as error,
        lab.edit(model, {"layers.1.*.pre_norm": settings}),
    ):
        pass
    assert "\n" not in str(error.value)
    assert n_hooks(model) == 0


def test_settings_that_the_norm_has_no_use_for_are_refused() -> None:
    model = tiny_model(norm_plan=KINDS)
    dyt, layer = "layers.*.feed_forward.pre_norm", "norm"
    with pytest.raises(RequestError, match=r"'norm': norm is of kind layer; freeze is for rms and scale"):
        edited_norms(model, {layer: {"freeze": "quadratic"}}, TEXT)
    with pytest.raises(RequestError, match=r"layers.0.feed_forward.pre_norm would be of kind dyt, which has no eps"):
        edited_norms(model, {dyt: {"eps": 0.1}})
    (rms,) = edited_norms(model, {"layers.0.feed_forward.pre_norm": {"eps": 0.1, "kind": "rms"}}).values()
    assert rms.eps == 0.1
    pre = "layers.0.attention.pre_norm"
    with lab.edit(model, {pre: {"freeze": "quadratic"}}, TEXT):
        with pytest.raises(RequestError, match="kind frozen; give all its settings in one edit"):
            edited_norms(model, {pre: {"gain": 2.0}})
        assert isinstance(model.get_submodule(pre), Frozen)
        assert isinstance(edited_norms(model, {pre: {"skip": True}})[pre], nn.Identity)


def test_patterns_that_share_a_norm_or_are_no_mapping_are_refused() -> None:
    model = tiny_model()
    both = {"layers.*.*.pre_norm": {"eps": 0.1}, PATH: {"gain": 2.0}}
    with pytest.raises(RequestError, match=rf"'layers.\*.\*.pre_norm' and '{PATH}' both match {PATH}: give each"):
        edited_norms(model, both)
    with pytest.raises(RequestError, match="edits must be a mapping of patterns to settings, not 'norm'"):
        edited_norms(model, "norm")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="matches only empty slots"):
        edited_norms(model, {"layers.*.*.out_norm": {"eps": 0.1}})
    with pytest.raises(RequestError, match="T at least 2"):
        edited_norms(model, {PATH: {"freeze": "quadratic"}}, [1])
