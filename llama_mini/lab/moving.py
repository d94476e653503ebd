"""Moving norms of a real model to another place in their branch, gains and all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llama_mini.checkpoint.plain import check_plain
from llama_mini.errors import RequestError
from llama_mini.lab.paths import select, slot_width
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import BRANCHES
from llama_mini.model.norm_slots import ONLY_IN, NormSpec
from llama_mini.validate import check_choice

Placed = tuple[NormSpec | None, nn.Module]  # what a slot gets: its plan, and the module whose parameters it takes over
_TARGETS = ("pre", "mid", "out", "post")
_OUTSIDE = {"embed_norm": "embed", "norm": "final"}  # slot outside the layers -> its name in the plan


def move(model: Llama, pattern: str | Sequence[str], to: str) -> Llama:
    """A new model whose norms at `pattern` are in the slot `to` of their branch: pre, mid, out or post.

    The norms keep their gains. The new model shares every parameter with `model`, which does not change. It has its own
    modules and config, and the config's plan describes the new places, so it can be saved and loaded. Moving the norms
    back gives the original logits, bit for bit.

    Raises RequestError, naming the path: for a slot that is taken or has another width, for the norm of a projection
    (q, k, v, gate, up), for a norm outside the layers, for one that both branches of a parallel layer read, and for a
    model that is edited or optimized.
    """
    check_choice("slot to move to", to, _TARGETS, RequestError)
    check_plain(model)
    config, norms = model.config, dict[str, Placed]()
    for path in select(model, pattern):
        at, _, slot = path.rpartition(".")
        slot, target = slot.removesuffix("_norm"), f"{at}.{to}_norm"
        if not at:
            raise RequestError(f"{path} is outside the layers and cannot be moved; give norms of layers.*")
        if slot in ONLY_IN:
            raise RequestError(f"{path} norms a projection and cannot be moved; leave {', '.join(ONLY_IN)} norms out")
        if config.norm_plan.parallel and (slot, at.endswith("attention")) == ("pre", True):
            raise RequestError(f"{path} is read by both branches of a parallel layer and cannot be moved; leave it out")
        if slot == to:
            raise RequestError(f"{path} is already in the slot {to}; leave it out")
        if target in norms or isinstance(model.get_submodule(target), Norm):
            raise RequestError(f"{target} is taken, so {path} cannot move there; move that norm first")
        width, new_width = slot_width(config, path), slot_width(config, target)
        if width != new_width:
            raise RequestError(
                f"{path} is {width} wide and the {to} slot of its branch {new_width}; choose a slot of its width"
            )
        norms |= {path: (None, nn.Identity()), target: (spec_at(config, path), model.get_submodule(path))}
    return with_norms(model, norms)


def with_norms(model: Llama, norms: Mapping[str, Placed]) -> Llama:
    """A new model with these norms in its slots, and a plan that says so; it shares all other parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, (_, norm) in norms.items():
        parameters = {name: p for name, p in parameters.items() if not name.startswith(f"{path}.")}
        parameters |= {f"{path}.{name}": parameter for name, parameter in norm.named_parameters()}
    return rebuilt(model, with_specs(model.config, {path: spec for path, (spec, _) in norms.items()}), parameters)


def with_specs(config: LlamaConfig, specs: Mapping[str, NormSpec | None]) -> LlamaConfig:
    """The configuration whose plan has these norms in its slots, by path."""
    plan = config.norm_plan
    layers = [dict(zip(BRANCHES, plan.layer(i), strict=True)) for i in range(config.n_layers)]
    for path, spec in specs.items():
        layer, branch, slot = _place(path)
        change: dict[str, Any] = {slot: spec}
        if branch:
            layers[layer][branch] = replace(layers[layer][branch], **change)
        else:
            plan = replace(plan, **change)
    plan = plan.with_layers([(branches["attention"], branches["feed_forward"]) for branches in layers])
    return replace(config, norm_plan=plan)


def spec_at(config: LlamaConfig, path: str) -> NormSpec | None:
    """The norm that the plan has in the slot at `path`; None for an empty one."""
    layer, branch, slot = _place(path)
    return getattr(config.norm_plan.layer(layer)[BRANCHES.index(branch)] if branch else config.norm_plan, slot)


def _place(path: str) -> tuple[int, str, str]:
    """Layer, branch and slot as the plan names them; the embed and final slots have no branch."""
    if path in _OUTSIDE:
        return 0, "", _OUTSIDE[path]
    _, layer, branch, slot = path.split(".")
    return int(layer), branch, slot.removesuffix("_norm")


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
