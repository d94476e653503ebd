"""Edits of norms: each acts as its formula says, alters nothing where it should not, and is undone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llama_mini import Llama, lab
from llama_mini.errors import RequestError
from llama_mini.lab.editing import edited_norms
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(2, 23)
PATH = "layers.1.feed_forward.pre_norm"
QK = "layers.1.attention.q_norm"


def gain_of(model: Llama, path: str) -> np.ndarray:
    return model.get_submodule(path).weight.double().numpy()


def square(x: np.ndarray) -> np.ndarray:
    return (x**2).mean(-1, keepdims=True)


def first(x: np.ndarray, share: float = 0.0625) -> np.ndarray:
    return x[..., : round(x.shape[-1] * share)]


EPS = 1e-5  # the tiny model's


def plain(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(square(x) + EPS)


def masked(g: np.ndarray, other: np.ndarray) -> np.ndarray:
    """g, but in dimensions 3 and 7 `other`."""
    return np.where(np.isin(np.arange(len(g)), [3, 7]), other, g)


FORMULAS = {  # settings -> x, g -> y, in float64
    "eps": ({"eps": 0.5}, lambda x, g: g * x / np.sqrt(square(x) + 0.5)),
    "layer": (
        {"kind": "layer"},
        lambda x, g: g * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS),
    ),
    "scale": ({"kind": "scale"}, lambda x, g: g.mean() * x / np.sqrt(square(x) + EPS)),
    "l2": ({"kind": "l2"}, lambda x, g: g * x / np.sqrt((x**2).sum(-1, keepdims=True) + EPS)),
    "prms": ({"kind": "prms"}, lambda x, g: g * x / np.sqrt(square(first(x)) + EPS)),
    "dyt": ({"kind": "dyt"}, lambda x, g: g * np.tanh(0.5 * x)),
    "gain 2": ({"gain": 2}, lambda x, g: 2 * x / np.sqrt(square(x) + EPS)),
    "gain scale": ({"gain": ("scale", -1.5)}, lambda x, g: -1.5 * g * x / np.sqrt(square(x) + EPS)),
    "gain from JSON": ({"gain": ["scale", 3]}, lambda x, g: 3 * g * x / np.sqrt(square(x) + EPS)),
    "gain mean": ({"gain": "mean"}, lambda x, g: g.mean() * x / np.sqrt(square(x) + EPS)),
    "gain one": ({"gain": "one"}, lambda x, g: x / np.sqrt(square(x) + EPS)),
    "gain vector": ({"gain": [0.1 * i for i in range(48)]}, lambda x, g: 0.1 * np.arange(x.shape[-1]) * plain(x)),
    "gain mask": ({"gain": {"dims": [3, 7]}}, lambda x, g: masked(g, 0 * g) * plain(x)),
    "gain of dims": (
        {"gain": {"dims": [3, 7], "gain": ["scale", 3]}},
        lambda x, g: masked(g, 3 * g) * plain(x),
    ),
    "alpha": ({"kind": "dyt", "alpha": 2.0}, lambda x, g: g * np.tanh(2 * x)),
    "kind, eps, gain": (
        {"kind": "l2", "eps": 2.0, "gain": 0.3},
        lambda x, g: 0.3 * x / np.sqrt((x**2).sum(-1, keepdims=True) + 2),
    ),
    "freeze mean": ({"freeze": "quadratic", "keep": "none"}, lambda x, g: g * x / np.sqrt((x**2).mean() + EPS)),
    "freeze token": ({"freeze": "token"}, lambda x, g: g * x / np.sqrt(square(x) + EPS)),
    "freeze, gain": (
        {"freeze": "quadratic", "keep": "none", "gain": "one"},
        lambda x, g: x / np.sqrt((x**2).mean() + EPS),
    ),
    "freeze, keep first": (
        {"freeze": "quadratic"},
        lambda x, g: (
            g
            * x
            / np.sqrt(np.concatenate([square(x[:, :1]), 0 * square(x[:, 1:]) + (x[:, 1:] ** 2).mean()], axis=1) + EPS)
        ),
    ),
}


@pytest.mark.parametrize("path", [PATH, QK])
@pytest.mark.parametrize("name", FORMULAS)
def test_an_edit_is_its_formula(name: str, path: str) -> None:
    settings, formula = FORMULAS[name]
    model = tiny_model(norm_plan="pre+qk", head_dim=32)
    if name == "gain vector":
        settings = {"gain": settings["gain"][: model.get_submodule(path).dim]}
    before = lab.capture(model, TEXT)[path]
    base = lab.score(model, TEXT)
    with lab.edit(model, {path: settings}, TEXT) as edited:
        assert edited is model
        record = lab.capture(model, TEXT)[path]
        cost = lab.score(model, TEXT, against=base)
    assert torch.equal(record.x, before.x)
    expected = formula(record.x.double().numpy(), gain_of(model, path))
    np.testing.assert_allclose(record.y.double().numpy(), expected, rtol=2e-5, atol=2e-6)
    if name != "freeze token":  # the probe acts, in the norm and in the logits
        assert (record.y - before.y).abs().max() > 1e-3
        assert cost.kl > 0
        assert not torch.equal(cost.logits, base.logits)


def test_a_frozen_norm_keeps_its_statistic_when_its_input_changes() -> None:
    """c is the unedited model's, by position, although an earlier edit multiplies what comes in."""
    model = tiny_model(norm_plan="pre+embed")
    path = "layers.0.attention.pre_norm"
    x = lab.capture(model, TEXT)[path].x.double().numpy()
    for freeze, c in {"token": np.sqrt(square(x) + EPS), "quadratic": np.sqrt((x**2).mean() + EPS)}.items():
        with lab.edit(model, {path: {"freeze": freeze, "keep": "none"}, "embed_norm": {"gain": ("scale", 3.0)}}, TEXT):
            y = lab.capture(model, TEXT)[path].y.double().numpy()
        np.testing.assert_allclose(y, gain_of(model, path) * 3 * x / c, rtol=1e-5, atol=1e-6)


def test_token_0_keeps_its_own_statistic() -> None:
    model = tiny_model(norm_plan="pre+embed")
    path = "layers.0.attention.pre_norm"
    plain = lab.capture(model, TEXT)[path].y
    louder = {"embed_norm": {"gain": ("scale", 3.0)}}
    with lab.edit(model, {path: {"freeze": "token"}} | louder, TEXT):
        y = lab.capture(model, TEXT)[path].y
    torch.testing.assert_close(y[:, 0], plain[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[:, 1:], 3 * plain[:, 1:], rtol=1e-4, atol=1e-5)


GEMMA = NormPlan(
    attention=BranchPlan(pre=NormSpec(gain="1+w", cast="late"), q=NormSpec(gain="none")),
    feed_forward=BranchPlan(pre=NormSpec(kind="dyt"), out=NormSpec(kind="scale", scale=0.7)),
    final=NormSpec(kind="layer", gain="1+w"),
)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("plan", ["pre", "out+qk:full", GEMMA], ids=["pre", "out+qk:full", "every kind of gain"])
def test_a_change_that_alters_nothing_costs_nothing(dtype: torch.dtype, plan: Any) -> None:
    model = tiny_model(dtype=dtype, norm_plan=plan)
    base = lab.score(model, TEXT)
    for row in lab.norms(model):
        edits: list[dict[str, Any]] = [{"kind": row.kind}, {"cast": row.cast}, {"gain": ("scale", 1.0)}]
        edits.append({"skip": False})
        if row.kind != "dyt":
            edits.append({"eps": row.eps})
        if row.gain == "none":
            edits += [{"gain": "one"}, {"gain": "mean"}, {"gain": 1}]
        if row.kind in ("rms", "scale"):
            edits += [{"freeze": "token"}, {"freeze": "token", "keep": "none"}]
        for settings in edits:
            with lab.edit(model, {row.path: settings}, TEXT):
                same = lab.score(model, TEXT, against=base)
            assert (same.dloss, same.kl, same.top1) == (0, 0, 1), (row, settings)
            assert torch.equal(same.logits, base.logits)


def test_all_norms_frozen_by_token_change_no_bit() -> None:
    model = tiny_model(norm_plan="peri+qk")
    base = lab.score(model, TEXT)
    with lab.edit(model, {"layers.*.*.*": {"freeze": "token"}, "norm": {"freeze": "token"}}, TEXT):
        assert set(lab.norms(model).column("kind")) == {"frozen"}
        assert torch.equal(lab.score(model, TEXT).logits, base.logits)


def test_skip_is_the_model_without_the_norm() -> None:
    """Against the same weights in a model whose plan has no such norms."""
    model, bare = tiny_model(norm_plan="pre+qk"), tiny_model(norm_plan="pre")
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in bare.state_dict()})
    with lab.edit(model, {"layers.*.attention.[qk]_norm": {"skip": True}}):
        assert torch.equal(model(TEXT), bare(TEXT))
        assert type(model.get_submodule(QK)) is nn.Identity
    assert not torch.equal(model(TEXT), bare(TEXT))


@pytest.mark.parametrize("plan", ["sub+qk+embed", "peri", "post", "normformer"])
def test_a_norm_in_an_empty_slot_is_that_of_the_plan(plan: str) -> None:
    """Against the same weights in a model whose plan has such norms, with unit gains."""
    model, full = tiny_model(norm_plan="none"), tiny_model(norm_plan=plan.removesuffix("-final"))
    for module in full.modules():
        if isinstance(module, Norm):
            module.reset_parameters()
    full.load_state_dict(model.state_dict(), strict=False)
    edits = {row.path: {"kind": "rms"} for row in lab.norms(full) if row.path != "norm"}
    if plan == "post":
        edits["norm"] = {"skip": True}
    bare = model(TEXT)
    with lab.edit(model, edits):
        assert [row.path for row in lab.norms(model)] == [row.path for row in lab.norms(full)]
        assert torch.equal(model(TEXT), full(TEXT))
    assert torch.equal(model(TEXT), bare)


def test_a_kind_fills_every_slot_it_matches_and_the_rest_only_change_norms() -> None:
    model = tiny_model()
    with lab.edit(model, {"layers.*.*.*": {"kind": "layer", "eps": 1e-3}}):
        rows = lab.norms(model)
        assert len(rows) == 3 * 13 + 1
        assert set(rows.column("eps")) == {1e-3, EPS}
    with lab.edit(model, {"layers.*.*.*": {"gain": 3.0}}):
        assert len(lab.norms(model)) == 7
        assert lab.norms(model).column("max").count(3.0) == 6


def test_float64_and_half_precision_models_keep_their_dtype() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny_model(dtype=dtype)
        for settings in FORMULAS.values():
            with lab.edit(model, {PATH: settings[0]}, TEXT):
                assert lab.capture(model, TEXT)[PATH].y.dtype == dtype


def test_parameters_are_shared_unless_changed() -> None:
    model = tiny_model(norm_plan=GEMMA)
    weights = {path: module.weight for path, module in norms_of(model).items()}
    pre, out = "layers.0.attention.pre_norm", "layers.0.feed_forward.out_norm"
    for path, settings in {pre: {"eps": 1.0, "cast": "early", "kind": "layer"}, out: {"freeze": "quadratic"}}.items():
        (module,) = edited_norms(model, {path: settings}, TEXT).values()
        assert module.weight is weights[path]
    (dyt,) = edited_norms(model, {"layers.0.feed_forward.pre_norm": {"cast": "late"}}).values()
    assert dyt.alpha is model.layers[0].feed_forward.pre_norm.alpha
    (louder,) = edited_norms(model, {pre: {"gain": ("scale", 2.0)}}).values()
    assert louder.weight is not weights[pre]
    assert not louder.weight.requires_grad
    assert not louder.training


def norms_of(model: Llama) -> Mapping[str, Norm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Norm)}


def test_a_bias_stays_through_an_edit() -> None:
    biased = NormPlan.parse("pre", 3).with_norms(kind="layer", cast="late", bias=True)
    model = tiny_model(4, torch.float64, norm_plan=biased)
    norm = model.get_submodule(PATH)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 5, norm.dim)))
    normed = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 0.25).sqrt()).numpy()
    with lab.edit(model, {PATH: {"eps": 0.25, "gain": ("scale", 2.0)}}):
        expected = 2 * norm.weight.numpy() * normed + norm.bias.numpy()
        np.testing.assert_allclose(model.get_submodule(PATH)(x).numpy(), expected, rtol=1e-9, atol=1e-12)
        assert model.get_submodule(PATH).bias is norm.bias
    for settings, message in (
        ({"kind": "rms"}, "is of kind layer with a bias, which kind rms does not have"),
        ({"cast": "early"}, "is of kind layer with a bias, which rounds last"),
    ):
        with pytest.raises(RequestError, match=message), lab.edit(model, {PATH: settings}):
            pass


def test_the_empty_slot_of_a_parallel_layer_can_be_filled() -> None:
    model = tiny_model(4, norm_plan="parallel")
    plain = model(TEXT)
    with lab.edit(model, {PATH: {"kind": "l2"}}):
        assert (model(TEXT) - plain).abs().max() > 1e-3
    assert torch.equal(model(TEXT), plain)
