"""Ablation computes nothing twice, and its costs are those of whole passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_mini import lab
from llama_mini.lab.ablation import Base
from llama_mini.lab.editing import edited_norms, swapped
from tests.optimize.conftest import fast_of
from tests.tiny_models import random_tokens, tiny_model

TEXT = random_tokens(2, 40)


class Skip(nn.Module):
    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


PLACEMENTS = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "everywhere": {"norm_plan": "peri+qk+embed"},
    "post": {"norm_plan": "post"},
    "parallel": {"norm_plan": "parallel"},
}


@pytest.mark.parametrize("settings", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("fast", [False, True])
def test_costs_have_the_bits_of_whole_passes(fast: bool, settings: dict[str, Any]) -> None:
    """Though the layers below a change are not computed again."""
    model = tiny_model(3, **settings)
    model = fast_of(model) if fast else model
    base, change = lab.score(model, TEXT), {"gain": ("scale", 1.5)}

    def whole(modules: dict[str, nn.Module]) -> tuple[Any, ...]:
        with swapped(model, modules):
            score = lab.score(model, TEXT, against=base)
        return score.dloss, score.se, score.kl, score.top1

    rows = [*lab.ablate(model, TEXT, **change), *lab.skip_layers(model, TEXT)]
    changes = [edited_norms(model, {path: change}) for path in lab.norms(model).column("path")]
    changes += [{f"layers.{i}": Skip()} for i in range(3)]
    assert len(rows) == len(changes)
    for row, modules in zip(rows, changes, strict=True):
        assert (row.dloss, row.se, row.kl, row.top1) == whole(modules), row


def test_layers_below_a_change_run_once() -> None:
    model, runs = tiny_model(), [0, 0, 0]

    def count(i: int) -> Callable[..., None]:
        return lambda *_: runs.__setitem__(i, runs[i] + 1)

    hooks = [layer.attention.register_forward_hook(count(i)) for i, layer in enumerate(model.layers)]
    lab.ablate(model, TEXT, "layers.1.*.*,norm", eps=0.3)
    assert runs == [1, 3, 3]
    lab.skip_layers(model, TEXT)
    assert runs == [1 + 2, 3 + 3, 3 + 4]  # and once more for the angles
    for hook in hooks:
        hook.remove()


def test_norms_are_frozen_once_for_each_set_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model(), torch.arange(80).view(2, 40)
    model.tok_embeddings.weight[text[:, 0]] *= 50  # the only massive tokens
    keeps = ("none", "first", "massive")
    expected = [lab.ablate(model, text, keep=keep) for keep in keeps]
    measured: list[str] = []
    ablated = Base.ablated
    monkeypatch.setattr(Base, "ablated", lambda self, path, norms: measured.append(path) or ablated(self, path, norms))
    paths = lab.norms(model).column("path")
    assert list(Base(model, text).frozen(paths, keeps)) == [list(rows) for rows in zip(*expected, strict=True)]
    assert [measured.count(path) for path in paths] == [2] * 7
