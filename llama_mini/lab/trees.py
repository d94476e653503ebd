"""A model of another config around the parameters of one that is there: what `move`, `fold` and `center` give back."""

from collections.abc import Mapping

import torch
from torch import nn

from llama_mini.errors import RequestError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm


def check_plain(model: Llama) -> None:
    """Refuses, with a RequestError that names the module, a model that its config does not describe."""
    described = dict(_on_meta(model.config).named_modules())
    found = dict(model.named_modules())
    for path in [*described, *found]:
        here, there = found.get(path), described.get(path)
        if path and _settings(here) != _settings(there):
            raise RequestError(
                f"{path} is {_shown(here)} where the model's config describes {_shown(there)}: "
                "leave the edit, or load the checkpoint without optimisation, and ask again"
            )


def rebuilt(model: Llama, config: LlamaConfig, parameters: Mapping[str, nn.Parameter]) -> Llama:
    """The model that `config` describes, around these very parameters; mode and rotary table are those of `model`."""
    tree = _on_meta(config)
    for name in [name for name, _ in tree.named_parameters()]:
        parent, _, leaf = name.rpartition(".")
        setattr(tree.get_submodule(parent), leaf, parameters[name])
    tree.rope.inv_freq = model.rope.inv_freq
    return tree.train(model.training)


def _on_meta(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def _settings(module: nn.Module | None) -> tuple[object, ...]:
    numbers = (module.dim, module.eps, module.gain, module.cast, module.scale) if isinstance(module, Norm) else ()
    return type(module), *numbers


def _shown(module: nn.Module | None) -> str:
    if module is None:
        return "nothing"
    return f"{type(module).__name__}({module.extra_repr()})"[:100]
