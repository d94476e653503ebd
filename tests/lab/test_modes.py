"""The lab gives the same numbers in whatever modes of torch the caller has set, and leaves them as they were."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_mini import Llama, lab
from llama_mini.lab.tour import tour
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import BranchPlan, NormSpec
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(2, 11)
PRE = "layers.*.attention.pre_norm"
PLAN = NormPlan(attention=BranchPlan(pre=NormSpec(gain="none"), q=NormSpec()), feed_forward=BranchPlan(pre=NormSpec()))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": partial(default_dtype, torch.float64),
    "bfloat16": partial(default_dtype, torch.bfloat16),
    "meta": partial(default_device, "meta"),
}
TRAINING: dict[str, Callable[[], str]] = {
    "init": lambda: lab.init("peri", 2, dim=16, seeds=1).to_json(),
    "sweep": lambda: lab.sweep(["pre", "out+qk"], [1, 2], dim=16, seeds=1).to_json(),
    "race": lambda: lab.race("pre", steps=3, seeds=1, depth=1, dim=8).to_json(),
}


def edited(model: Llama, **settings: Any) -> Tensor:
    with lab.edit(model, {PRE: settings}, TEXT.tolist()):
        return lab.score(model, TEXT.tolist()).logits.clone()


MEASURING: dict[str, Callable[[Llama], Any]] = {
    "score": lambda model: repr(lab.score(model, TEXT, against=lab.score(model, TEXT.tolist()))),
    "capture": lambda model: [record.peak for record in lab.capture(model, TEXT.tolist()).values()],
    "ablate": lambda model: str(lab.ablate(model, TEXT, "norm")),
    "skip": lambda model: str(lab.skip_layers(model, TEXT)),
    "norms": lambda model: str(lab.norms(model)),
    "doctor": lambda model: str(lab.doctor(model, TEXT)),
    "fold": lambda model: lab.fold(model, "layers.*.feed_forward.pre_norm")(TEXT).tolist(),
    "move": lambda model: lab.move(model, PRE, "out")(TEXT).tolist(),
    **{
        f"edit {settings}": partial(lambda model, settings: edited(model, **settings).tolist(), settings=settings)
        for settings in ({"gain": 0.3}, {"kind": "layer", "gain": ("scale", 0.3)}, {"kind": "dyt"}, {"freeze": "token"})
    },
}


@cache
def plainly(what: str) -> str:
    return TRAINING[what]()


def modes() -> tuple[Any, ...]:
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return *grad, torch.get_default_dtype(), torch.get_default_device()


@pytest.mark.parametrize("mode", [*MODES, "autocast"])
@pytest.mark.parametrize("what", TRAINING)
def test_what_trains_sets_its_own_modes(what: str, mode: str) -> None:
    expected = plainly(what)
    with MODES[mode]() if mode in MODES else torch.autocast("cpu", torch.bfloat16):
        before = modes()
        assert TRAINING[what]() == expected
        assert modes() == before


def test_an_error_in_a_training_leaves_the_modes_as_they_were() -> None:
    with default_dtype(torch.float64), torch.inference_mode():
        before = modes()
        with pytest.raises(Exception, match="unknown preset"):
            lab.race("norm")
        assert modes() == before


@pytest.mark.parametrize("mode", ["inference_mode", "bfloat16", "meta"])
@pytest.mark.parametrize("what", MEASURING)
def test_what_measures_gives_the_same_in_every_mode(what: str, mode: str) -> None:
    model = tiny_model(norm_plan=PLAN, n_layers=2).requires_grad_(True)
    expected = MEASURING[what](model)
    with MODES[mode]():
        before = modes()
        assert MEASURING[what](model) == expected
        assert modes() == before


@pytest.mark.parametrize("what", [what for what in MEASURING if what not in ("fold", "move")])
def test_what_measures_builds_no_graph(what: str) -> None:
    def refuse(_: Tensor) -> Any:
        raise AssertionError("a tensor was kept for a backward pass")

    model = tiny_model(norm_plan=PLAN, n_layers=2).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x):
        MEASURING[what](model)
        with pytest.raises(AssertionError, match="was kept"):
            model(TEXT)


def test_a_tour_that_is_left_half_way_leaves_the_modes_as_they_were() -> None:
    steps = tour(tiny_model(), TEXT[0].tolist())
    before = modes()
    next(steps)
    assert modes() == before


def test_a_model_folded_or_centred_in_inference_mode_can_be_trained() -> None:
    plain = tiny_model().requires_grad_(True)
    layer = {"pre": {"kind": "layer"}}
    plan = NormPlan.from_dict({"attention": layer, "feed_forward": layer, "final": {"kind": "layer"}})
    layered = tiny_model(norm_plan=plan).requires_grad_(True)
    with torch.inference_mode():
        new: list[nn.Module] = [lab.fold(plain), lab.center(layered)]
    for model in new:
        model(TEXT).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
