"""Each norm call of a tiny model of every family in transformers, repeated by ours from the same input, bit by bit."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.lab.recording import watched
from llama_mini.model.llama import Llama
from llama_mini.model.norm import LayerNorm, Norm
from tests.oracles import same_bits
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

BY_DEFAULT = ("gemma3_text", "nemotron", "cohere2", "olmo")  # 1+w, a bias, LayerNorm by steps, no gain; others are slow
DTYPES = ("float32", "bfloat16", "float16")


class Call:
    """One call of a norm of transformers."""

    def __init__(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        self.x, self.y, self.weight = x, y, weight


def recorded(model: nn.Module, tokens: Tensor) -> list[Call]:
    norms = {name: m for name, m in model.named_modules() if "Norm" in type(m).__name__ and not list(m.children())}
    calls: list[Call] = []

    def see(name: str, x: Tensor, y: Tensor) -> None:
        calls.append(Call(x.clone(), y.clone(), getattr(norms[name], "weight", None)))

    with watched(norms, see):
        logits(model, tokens)
    return calls


def in_order(model: Llama, tokens: Tensor) -> list[Norm]:
    """Our norms as the forward pass calls them."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, Norm)}
    seen: list[Norm] = []
    with watched(norms, lambda name, x, y: seen.append(norms[name])):
        model(tokens)
    return seen


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_every_norm_call_has_the_bits_of_transformers(model_type: str, tmp_path: Path) -> None:
    tokens, theirs = random_tokens(1, 40), random_model(model_type, 1)
    theirs.save_pretrained(tmp_path)
    moved = 0
    for dtype in DTYPES:
        calls = recorded(deepcopy(theirs).to(getattr(torch, dtype)), tokens)
        ours = Llama.from_pretrained(tmp_path, dtype=dtype)
        norms = in_order(ours, tokens)
        assert len(norms) == len(calls) > ours.config.n_layers * (1 if ours.config.norm_plan.parallel else 2)
        for norm, call in zip(norms, calls, strict=True):
            assert (norm.weight is None) == (call.weight is None)
            assert norm.weight is None or torch.equal(norm.weight, call.weight)
            assert same_bits(norm(call.x), call.y), dtype
            if type(norm) is not LayerNorm or norm.bias is None:  # with a bias there is one order
                norm.cast = {"early": "late", "late": "early"}[norm.cast]
            norm.eps += 1e-3
            moved += not same_bits(norm(call.x), call.y)
    assert moved > 2 * len(calls)  # another order and eps would have been seen
