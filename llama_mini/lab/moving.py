"""Moving norms of a real model to another place in their branch, gains and all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from llama_mini.checkpoint.plain import check_plain
from llama_mini.errors import RequestError
from llama_mini.lab.paths import select, slot_width
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import BRANCHES
from llama_mini.model.norm_slots import HEAD_SLOTS
from llama_mini.validate import check_choice

_TARGETS = ("pre", "mid", "out", "post")


def move(model: Llama, pattern: str | Sequence[str], to: str) -> Llama:
    """A new model whose norms at `pattern` are in the slot `to` of their branch: pre, mid, out or post.

    The norms keep their gains. The new model shares every parameter with `model`, which does not change. It has its own
    modules and config, and the config's plan describes the new places, so it can be saved and loaded. Moving the norms
    back gives the original logits, bit for bit.

    Raises RequestError, naming the path: for a slot that is taken or has another width, for a q, k or v norm, for a
    norm outside the layers, for one that both branches of a parallel layer read, and for a model that is edited or
    optimized.
    """
    check_choice("slot to move to", to, _TARGETS, RequestError)
    check_plain(model)
    config, n_layers = model.config, model.config.n_layers
    branches = {
        f"layers.{i}.{name}": branch
        for i in range(n_layers)
        for name, branch in zip(BRANCHES, config.norm_plan.layer(i), strict=True)
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path in select(model, pattern):
        at, _, slot = path.rpartition(".")
        slot = slot.removesuffix("_norm")
        if at not in branches:
            raise RequestError(f"{path} is outside the layers and cannot be moved; give norms of layers.*")
        if slot in HEAD_SLOTS:
            raise RequestError(f"{path} acts on heads and cannot be moved; leave q, k and v norms out")
        if config.norm_plan.parallel and (slot, at.endswith("attention")) == ("pre", True):
            raise RequestError(f"{path} is read by both branches of a parallel layer and cannot be moved; leave it out")
        if slot == to:
            raise RequestError(f"{path} is already in the slot {to}; leave it out")
        if getattr(branches[at], to) is not None:
            raise RequestError(f"{at}.{to}_norm is taken, so {path} cannot move there; move that norm first")
        width, new_width = slot_width(config, path), slot_width(config, f"{at}.{to}_norm")
        if width != new_width:
            raise RequestError(
                f"{path} is {width} wide and the {to} slot of its branch {new_width}; choose a slot of its width"
            )
        branches[at] = replace(branches[at], **{slot: None, to: getattr(branches[at], slot)})
        for name, _ in model.get_submodule(path).named_parameters():
            parameters[f"{at}.{to}_norm.{name}"] = parameters.pop(f"{path}.{name}")
    layers = [(branches[f"layers.{i}.attention"], branches[f"layers.{i}.feed_forward"]) for i in range(n_layers)]
    return rebuilt(model, replace(config, norm_plan=config.norm_plan.with_layers(layers)), parameters)


def rebuilt(model: Llama, config: LlamaConfig, parameters: Mapping[str, nn.Parameter]) -> Llama:
    """The model that `config` describes, with these parameters, not copies; mode and rotary table are `model`'s."""
    with torch.device("meta"):
        tree = Llama(config)
    for name in [name for name, _ in tree.named_parameters()]:
        parent, _, leaf = name.rpartition(".")
        setattr(tree.get_submodule(parent), leaf, parameters[name])
    tree.rope.inv_freq = model.rope.inv_freq
    if tree.sliding_rope is not None and model.sliding_rope is not None:
        tree.sliding_rope.inv_freq = model.sliding_rope.inv_freq
    return tree.train(model.training)
