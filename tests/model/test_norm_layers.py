"""The 61 norms of the real checkpoint inside the whole model, against what transformers had at the same places."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama_mini import Llama
from llama_mini.model.norm import RMSNorm
from tests.oracles import NormCall, read_norm_golden, same_bits

TOKENS, CALLS = read_norm_golden("smollm2")
TOLERANCE = 1e-4  # relative; the planted defects below are held to the same number, from the other side
SLOTS = {"input_layernorm": "attention.pre_norm", "post_attention_layernorm": "feed_forward.pre_norm"}


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> Llama:
    return Llama.from_pretrained(smollm2_dir, dtype="float32")


def path_here(call: NormCall) -> str:
    """The norm's path in our model: model.layers.7.input_layernorm -> layers.7.attention.pre_norm."""
    *layer, slot = call.name.removeprefix("model.").split(".")
    return ".".join([*layer, SLOTS.get(slot, slot)])


def relative(ours: Tensor, recorded: Tensor) -> float:
    """The largest difference within a token's vector over that vector's largest element, for the worst token.

    By token, because the first one's massive activations would hide a thousandfold error in the others.
    """
    return ((ours - recorded).abs().amax(-1) / recorded.abs().amax(-1)).max().item()


def worst_along_the_trajectory(model: Llama) -> float:
    """How far the model's norms are from the recorded ones in their inputs and outputs, over the whole forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor], output: Tensor, path: str) -> None:
        seen[path] = args[0], output

    norms = {path_here(call): model.get_submodule(path_here(call)) for call in CALLS}
    hooks = [norm.register_forward_hook(partial(record, path=path)) for path, norm in norms.items()]
    try:
        model(TOKENS)
    finally:
        for hook in hooks:
            hook.remove()
    differences = [
        relative(ours, recorded)
        for call in CALLS
        for ours, recorded in zip(seen[path_here(call)], (call.input, call.output), strict=True)
    ]
    assert len(differences) == 2 * 61
    return max(differences)


def test_the_models_norms_are_the_recorded_ones(model: Llama) -> None:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    assert sorted(norms) == sorted(path_here(call) for call in CALLS)
    for call in CALLS:
        norm = norms[path_here(call)]
        assert (norm.eps, norm.gain, norm.cast) == (call.eps, call.gain, call.cast)
        assert same_bits(norm.weight, call.weight), call.name
        assert same_bits(norm(call.input), call.output), call.name


def test_every_norm_stays_with_the_recorded_trajectory(model: Llama) -> None:
    assert worst_along_the_trajectory(model) <= TOLERANCE


@pytest.mark.parametrize(
    ("one", "other"),
    [("layers.7.attention", "layers.8.attention"), ("layers.29.attention", "layers.29.feed_forward")],
)
def test_a_swapped_pair_leaves_the_trajectory(
    model: Llama, monkeypatch: pytest.MonkeyPatch, one: str, other: str
) -> None:
    first, second = (model.get_submodule(path) for path in (one, other))
    norms = first.pre_norm, second.pre_norm
    monkeypatch.setitem(first._modules, "pre_norm", norms[1])  # setattr's undo would delete a module's attribute
    monkeypatch.setitem(second._modules, "pre_norm", norms[0])
    assert worst_along_the_trajectory(model) > TOLERANCE


def test_a_wrong_eps_leaves_the_trajectory(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            monkeypatch.setattr(module, "eps", 1e-6)
    assert worst_along_the_trajectory(model) > TOLERANCE


def test_eps_outside_the_root_leaves_the_trajectory(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def outside(norm: RMSNorm, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + norm.eps) * norm.weight

    monkeypatch.setattr(RMSNorm, "forward", outside)
    assert worst_along_the_trajectory(model) > TOLERANCE


def test_a_gain_left_at_one_leaves_the_trajectory(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = model.layers[-1].feed_forward.pre_norm
    monkeypatch.setitem(norm._parameters, "weight", nn.Parameter(torch.ones(norm.dim), requires_grad=False))
    assert worst_along_the_trajectory(model) > TOLERANCE
