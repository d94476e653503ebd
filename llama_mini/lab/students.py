"""The model that `heal` trains: a copy of the changed one, which owns what is trained and shares the rest."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.plain import check_plain
from llama_mini.errors import RequestError
from llama_mini.lab.applying import has_plan, placed
from llama_mini.lab.editing import Edits, edited_norms, swapped
from llama_mini.lab.moving import with_norms
from llama_mini.lab.paths import layer_of, slots
from llama_mini.lab.texts import Ids
from llama_mini.model.llama import Llama
from llama_mini.validate import join_names


def student_of(model: Llama, change: Edits | Llama, ids: Ids) -> tuple[Llama, int]:
    """A copy of the changed model to train, and the first layer that differs from `model`: -1 below all layers.

    change: as in `heal`. ids: the text to measure frozen norms on.
    """
    before, modules = _described(model), dict[str, nn.Module]()
    if isinstance(change, Llama):
        _check_related(model, change)
    else:
        modules = edited_norms(model, change, ids)
        if all(map(has_plan, modules.values())):
            change = with_norms(model, {path: placed(model, path, module) for path, module in modules.items()})
    with nullcontext() if isinstance(change, Llama) else swapped(model, modules):
        changed = change if isinstance(change, Llama) else model
        if not (differing := _differing(before, _described(changed))):
            raise RequestError("the change leaves the model as it is: there is nothing to heal")
        first = min(layer_of(name, len(model.layers)) for name in differing)
        return copied(changed, first), first


def _described(model: Llama) -> dict[str, Tensor | str]:
    """Parameters by name, and the settings of the norms by path: all in which related models can differ."""
    parameters: dict[str, Tensor | str] = dict(model.named_parameters(remove_duplicate=False))
    return parameters | {path: str(module) for path, module in slots(model).items()}


def _differing(before: dict[str, Tensor | str], after: dict[str, Tensor | str]) -> list[str]:
    def equal(a: Tensor | str | None, b: Tensor | str | None) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    return [name for name in before | after if not equal(before.get(name), after.get(name))]


def copied(model: Llama, first: int) -> Llama:
    """A copy that owns what is trained: the norms and matrices from layer `first` on. It shares the rest with `model`.

    Embedding and head are never trained: they are a large part of a small model, and the embedding is below the change.
    """
    own = {
        name
        for name, _ in model.named_parameters()
        if name not in ("tok_embeddings.weight", "lm_head.weight") and layer_of(name, len(model.layers)) >= first
    }
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for name, p in model.named_parameters() if name not in own
    }
    student = deepcopy(model, shared).train(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in own)
    return student


def trained(student: Llama) -> dict[str, nn.Parameter]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def _check_related(model: Llama, change: Llama) -> None:
    check_plain(change)
    ours, theirs = model.config, change.config
    others = replace(theirs, norm_plan=ours.norm_plan, tie_word_embeddings=ours.tie_word_embeddings)
    if differing := [f.name for f in fields(ours) if getattr(ours, f.name) != getattr(others, f.name)]:
        raise RequestError(
            f"the changed model has another {join_names(differing)} than the model: give one that move or insert made "
            "of this model"
        )


def as_wide(model: Llama, made: dict[int, nn.Parameter]) -> Llama:
    """The model in float32, or wider if it is, without gradients. Wide parameters are shared with it.

    made: by the id of a parameter, what it becomes; models that share parameters share them afterwards.
    """
    for p in model.parameters():
        wide = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=p.is_inference())
        made.setdefault(id(p), nn.Parameter(wide, requires_grad=False))
    return deepcopy(model, dict(made))


class Taper(nn.Module):
    """Goes from one norm to another as `share` falls from 1 to 0: between them in direction, and in the log of size.

    For a norm that is frozen, this is g·x/rms^p with p = `share`, up to a constant: a token whose size is 1,000 times
    the others' grows with each step, and not at once.
    """

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        super().__init__()
        self.old, self.new, self.share = old, new, 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.share == 0:
            return self.new(x)
        y, z = self.old(x), self.new(x)
        a, b = _size(y), _size(z)
        return (self.share * y / a + (1 - self.share) * z / b) * a**self.share * b ** (1 - self.share)


def _size(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True).clamp(min=1e-30).sqrt()


def tapers_of(model: Llama, student: Llama) -> dict[str, Taper]:
    """A taper for each norm in which the student differs."""
    differing = _differing(_described(model), _described(student))
    return {
        path: Taper(model.get_submodule(path), norm)
        for path, norm in slots(student).items()
        if any(name == path or name.startswith(f"{path}.") for name in differing)
    }
