"""A fast model stays open: hooks, swaps and edits of norms count, and the lab finds what it finds in a plain model."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_mini import Llama, lab
from llama_mini.errors import RequestError
from llama_mini.model.norm import LayerNorm, Norm
from llama_mini.optimize.fusable import FusedRMSNorm
from tests.optimize.conftest import FORMATS, Seen, error, fast_of, plain_of, prompts, steps
from tests.tiny_models import random_tokens, tiny_model

PLAN = "pre+qk+embed"
NORMS = [
    "embed_norm",
    *(
        f"layers.{i}.{slot}"
        for i in range(3)
        for slot in ("attention.pre_norm", "attention.q_norm", "attention.k_norm", "feed_forward.pre_norm")
    ),
    "norm",
]
TEXT = random_tokens(1, 40)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pair(quantize: str | None = None) -> tuple[Llama, Llama]:
    """A fast model and the plain one of its weights, for a test to change."""
    return copy.deepcopy(_pair(quantize))


@functools.cache
def _pair(quantize: str | None) -> tuple[Llama, Llama]:
    plain = tiny_model(norm_plan=PLAN)
    fast = fast_of(plain, quantize)
    return fast, plain_of(fast, plain)


def prompt_and_step(model: Llama) -> Tensor:
    """Logits of a prompt of 20 tokens, and of a step of two rows."""
    cache = model.new_cache(2, 32)
    first, _ = prompts(model, cache, (20, 1))
    return torch.cat([first, steps(model, cache, 1)[:, 0]])


@pytest.mark.parametrize("path", NORMS)
def test_a_hook_sees_every_norm_in_prompt_and_step_and_its_change_counts(path: str) -> None:
    fast, plain = pair()
    untouched = prompt_and_step(fast)
    seen: list[tuple[int, ...]] = []

    def change(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        seen.append(tuple(args[0].shape[:2]))
        return y.flip(-1) * 1.5

    hooks = [model.get_submodule(path).register_forward_hook(change) for model in (fast, plain)]
    found, expected = prompt_and_step(fast), prompt_and_step(plain)
    assert seen == [(1, 20), (1, 1), (2, 1)] * 2
    assert error(found, expected) < 1e-4
    assert error(found, untouched) > 1e-2
    for hook in hooks:
        hook.remove()
    assert torch.equal(prompt_and_step(fast), untouched)


@pytest.mark.parametrize("path", NORMS)
def test_a_pre_hook_changes_what_every_norm_is_given(path: str) -> None:
    fast, plain = pair()
    untouched = prompt_and_step(fast)
    for model in (fast, plain):
        model.get_submodule(path).register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1),))
    found = prompt_and_step(fast)
    assert error(found, prompt_and_step(plain)) < 1e-4
    assert error(found, untouched) > 1e-2


@pytest.mark.parametrize("path", NORMS)
def test_a_norm_is_swapped_for_another_kind(path: str) -> None:
    fast, plain = pair()
    untouched = prompt_and_step(fast)
    for model in (fast, plain):
        old = model.get_submodule(path)
        new = LayerNorm(old.dim, 0.3)
        new.weight = old.weight
        model.set_submodule(path, new)
    found = prompt_and_step(fast)
    assert error(found, prompt_and_step(plain)) < 1e-4
    assert error(found, untouched) > 1e-2


@pytest.mark.parametrize("change", [{"eps": 0.5}, {"scale": 0.7}, {"cast": "late"}, {"gain": "1+w"}], ids=str)
@pytest.mark.parametrize("path", NORMS)
def test_a_setting_is_changed_in_place(path: str, change: dict[str, Any]) -> None:
    fast, plain = pair()
    prompt_and_step(fast)  # what was looked up for it must not stay
    for model in (fast, plain):
        vars(model.get_submodule(path)).update(change)
    assert error(prompt_and_step(fast), prompt_and_step(plain)) < 1e-4


@pytest.mark.parametrize("path", NORMS)
def test_a_gain_is_changed_in_place_or_replaced(path: str) -> None:
    fast, plain = pair()
    prompt_and_step(fast)
    for model in (fast, plain):
        norm = model.get_submodule(path)
        norm.weight[1::2] *= -2
    assert error(prompt_and_step(fast), prompt_and_step(plain)) < 1e-4
    for model in (fast, plain):
        norm = model.get_submodule(path)
        norm.weight = nn.Parameter(norm.weight.flip(0).double())  # of another dtype, which no operator takes
    assert error(prompt_and_step(fast), prompt_and_step(plain)) < 1e-4


@pytest.mark.parametrize(
    "path", ["layers.1", "layers.1.attention", "layers.1.feed_forward", "layers.1.attention.out_norm", "layers"]
)
def test_hooks_on_blocks_and_branches_and_empty_slots_fire_too(path: str) -> None:
    fast, plain = pair()
    untouched = prompt_and_step(fast)
    for model in (fast, plain):
        model.get_submodule(path).register_forward_hook(lambda _, args, y: y.roll(1, -1) + y)
    found = prompt_and_step(fast)
    assert error(found, prompt_and_step(plain)) < 1e-4
    assert error(found, untouched) > 1e-2


def test_a_layer_is_swapped() -> None:
    fast, plain = pair()
    for model in (fast, plain):
        model.layers[0], model.layers[2] = model.layers[2], model.layers[0]
    assert error(prompt_and_step(fast), prompt_and_step(plain)) < 1e-4


def test_only_the_layer_that_is_watched_leaves_the_operator() -> None:
    fast, _ = pair()
    fast.layers[1].attention.q_norm.register_forward_hook(lambda *_: None)
    for tokens in (1, 12):
        with Seen() as seen:
            prompts(fast, fast.new_cache(1, 16), (tokens,))
        assert seen.names.count("layers") == 2


# --- gradients ---


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("chosen", [NORMS, ["layers.1.attention.q_norm"], ["norm"]], ids=len)
def test_gradients_of_norms_are_the_plain_models(chosen: list[str], length: int, quantize: str | None) -> None:
    def gradients(model: Llama) -> list[Tensor]:
        gains = [model.get_submodule(path).weight.requires_grad_() for path in chosen]
        with torch.enable_grad():
            loss = model(TEXT[:, :length]).square().mean()
            return list(torch.autograd.grad(loss, gains))

    for found, expected in zip(*map(gradients, pair(quantize)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_gradient_through_a_cache_is_refused_as_in_a_plain_model(length: int) -> None:
    for model in pair():
        model.get_submodule("layers.1.attention.q_norm").weight.requires_grad_()
        with torch.enable_grad(), pytest.raises(RuntimeError, match="inplace"):
            model(TEXT[:, :length], model.new_cache(1, 48))


# --- the lab ---


@pytest.mark.parametrize("quantize", FORMATS)
def test_capture_records_what_it_records_of_a_plain_model(quantize: str | None) -> None:
    found, expected = (lab.capture(model, TEXT) for model in pair(quantize))
    most = 3e-4 if quantize else 1e-4
    assert list(found) == list(expected) == NORMS
    for path in NORMS:
        for ours, theirs in ((found[path].x, expected[path].x), (found[path].y, expected[path].y)):
            assert error(ours.flatten(2), theirs.flatten(2)) < most, path
    for ours, theirs in zip(found.resid.resid_post, expected.resid.resid_post, strict=True):
        assert error(ours.x, theirs.x) < most


LAB: dict[str, Callable[[Llama], Any]] = {
    "score": lambda model: lab.score(model, TEXT).loss,
    "ablate": lambda model: [row.dloss for row in lab.ablate(model, TEXT)],
    "skip_layers": lambda model: [(row.dloss, row.angle) for row in lab.skip_layers(model, TEXT)],
    "norms": lambda model: list(lab.norms(model)),
    "audit": lambda model: [row.dloss for row in lab.audit(model, TEXT)],
    "doctor": lambda model: [(finding.path, finding.severity) for finding in lab.doctor(model)],
}


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("study", LAB)
def test_a_study_finds_what_it_finds_in_a_plain_model(study: str, quantize: str | None) -> None:
    found, expected = map(LAB[study], pair(quantize))
    if study in ("norms", "doctor"):
        assert found == expected
    else:
        rtol, atol = (1e-3, 3e-5) if quantize else (1e-4, 1e-5)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "edits", [{"*.*.*.pre_norm": {"eps": 0.4}}, {"norm": {"skip": True}}, {"layers.1.*.out_norm": {"kind": "rms"}}]
)
def test_an_edit_lasts_as_long_as_its_block(edits: dict[str, dict[str, Any]]) -> None:
    fast, plain = pair()
    untouched = prompt_and_step(fast)
    with lab.edit(fast, edits), lab.edit(plain, edits):
        found = prompt_and_step(fast)
        assert error(found, prompt_and_step(plain)) < 1e-4
        assert error(found, untouched) > 1e-3
    assert torch.equal(prompt_and_step(fast), untouched)


REFUSED: dict[str, Callable[[Llama, Path], Any]] = {
    "fold": lambda model, _: lab.fold(model),
    "center": lambda model, _: lab.center(model),
    "move": lambda model, _: lab.move(model, "layers.0.attention.pre_norm", "out"),
    "insert": lambda model, _: lab.insert(model, "layers.0.attention.out_norm", TEXT),
    "edited": lambda model, _: lab.edited(model, {"norm": {"eps": 0.1}}),
    "folded_gains": lambda model, _: lab.folded_gains(model),
    "save": lambda model, path: model.save_pretrained(path),
}


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_plain_weights_refuses_in_a_sentence(what: str, kernels: str, tmp_path: Path) -> None:
    fast = fast_of(tiny_model(), kernels=kernels)
    with pytest.raises(RequestError, match=r"load the checkpoint .*(plain|without)") as caught:
        REFUSED[what](fast, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_every_norm_of_the_model_is_tested_here() -> None:
    named = tiny_model(norm_plan=PLAN).named_modules()
    assert sorted(name for name, module in named if isinstance(module, Norm)) == sorted(NORMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_by_itself_gives_what_the_plain_one_gives_however_it_is_set(dtype: torch.dtype) -> None:
    fast, plain = pair()
    x = torch.randn(3, 5, fast.config.dim, generator=torch.Generator().manual_seed(0))
    settings: list[dict[str, Any]] = [
        {},
        {"cast": "late"},
        {"eps": 0.5},
        {"scale": 0.25},
        {"gain": "1+w"},
        {"weight": None},
    ]
    for changes in settings:
        ours, theirs = (copy.deepcopy(model.norm).to(dtype) for model in (fast, plain))
        assert isinstance(ours, FusedRMSNorm)
        for name, value in changes.items():
            setattr(ours, name, value)
            setattr(theirs, name, value)
        for wide in (x.to(dtype), x.double(), x[:0].to(dtype), x[0, 0].to(dtype), x.mT.contiguous().mT.to(dtype)):
            torch.testing.assert_close(ours(wide), theirs(wide), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        with pytest.raises(ValueError, match="got an input of shape"):
            ours(x[..., 1:])
        with torch.enable_grad():
            assert ours(x.to(dtype).requires_grad_()).requires_grad
