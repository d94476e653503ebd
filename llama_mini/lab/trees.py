"""A new model with another config around the parameters of an existing one: what `move`, `fold` and `center` return."""

from collections.abc import Mapping

import torch
from torch import nn

from llama_mini.errors import RequestError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm


def check_plain(model: Llama) -> None:
    """Refuses a model whose modules are not those of its config, with a RequestError that names the module."""
    expected, actual = dict(_on_meta(model.config).named_modules()), dict(model.named_modules())
    for path in [*expected, *actual]:
        module, planned = actual.get(path), expected.get(path)
        if path and _settings(module) != _settings(planned):
            raise RequestError(
                f"{path} is {_describe(module)}, but the model's config describes {_describe(planned)}: "
                "leave the edit, or load the checkpoint without optimization, and try again"
            )


def rebuilt(model: Llama, config: LlamaConfig, parameters: Mapping[str, nn.Parameter]) -> Llama:
    """The model that `config` describes, with these parameters, not copies; mode and rotary table are `model`'s."""
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


def _describe(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"{type(module).__name__}({module.extra_repr()})"[:100]
