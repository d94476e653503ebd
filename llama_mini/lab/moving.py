"""Moving norms of a real model to another place in their branch, gains and all."""

from dataclasses import replace

from llama_mini.errors import RequestError
from llama_mini.lab.paths import select
from llama_mini.lab.trees import check_plain, rebuilt
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import BRANCHES
from llama_mini.model.norm_slots import HEAD_SLOTS
from llama_mini.validate import short_repr

_PLACES = ("pre", "mid", "out", "post")


def move(model: Llama, pattern: str, to: str) -> Llama:
    """A new model whose norms at `pattern` are in the slot `to` of their branch: pre, mid, out or post.

    The norms keep their gains. The new model shares every parameter with `model`, which stays as it is; its tree and
    config are its own, and the config's plan says where the norms are now, so that it is saved and loaded like any
    other. Norms that are moved back give the logits of before, bit for bit.

    Raises RequestError that names the path: the slot is taken or sees another width, the norm is a q, k or v norm or
    stands outside the layers, or the model is edited or optimised.
    """
    if to not in _PLACES:
        raise RequestError(f"norms cannot be moved to {short_repr(to)}; known: {', '.join(_PLACES)}")
    check_plain(model)
    config, n_layers = model.config, model.config.n_layers
    branches = {
        f"layers.{i}.{name}": branch
        for i in range(n_layers)
        for name, branch in zip(BRANCHES, config.norm_plan.layer(i), strict=True)
    }
    parameters = dict(model.named_parameters())
    for path in select(model, pattern):
        at, _, slot = path.rpartition(".")
        slot = slot.removesuffix("_norm")
        if at not in branches:
            raise RequestError(f"{path} stands outside the layers and has no other place; give norms of layers.*")
        if slot in HEAD_SLOTS:
            raise RequestError(f"{path} belongs to the heads and has no other place; leave q, k and v norms out")
        if getattr(branches[at], to) is not None:
            taken = "is there already" if slot == to else "cannot move there"
            raise RequestError(f"{at}.{to}_norm is taken, so {path} {taken}; leave it out or move the other one first")
        widths = _width(config, at, slot), _width(config, at, to)
        if widths[0] != widths[1]:
            raise RequestError(
                f"{path} is {widths[0]} wide and the {to} slot of its branch {widths[1]}; choose a slot of its width"
            )
        branches[at] = replace(branches[at], **{slot: None, to: getattr(branches[at], slot)})
        for name, _ in model.get_submodule(path).named_parameters():
            parameters[f"{at}.{to}_norm.{name}"] = parameters.pop(f"{path}.{name}")
    layers = [(branches[f"layers.{i}.attention"], branches[f"layers.{i}.feed_forward"]) for i in range(n_layers)]
    return rebuilt(model, replace(config, norm_plan=config.norm_plan.with_layers(layers)), parameters)


def _width(config: LlamaConfig, branch: str, slot: str) -> int:
    if slot != "mid":
        return config.dim
    return config.n_heads * config.head_dim if branch.endswith(".attention") else config.hidden_dim
