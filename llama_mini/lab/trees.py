"""A new model with another config around the parameters of an existing one: what `move`, `fold` and `center` return."""

from collections.abc import Mapping

import torch
from torch import nn

from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama


def rebuilt(model: Llama, config: LlamaConfig, parameters: Mapping[str, nn.Parameter]) -> Llama:
    """The model that `config` describes, with these parameters, not copies; mode and rotary table are `model`'s."""
    with torch.device("meta"):
        tree = Llama(config)
    for name in [name for name, _ in tree.named_parameters()]:
        parent, _, leaf = name.rpartition(".")
        setattr(tree.get_submodule(parent), leaf, parameters[name])
    tree.rope.inv_freq = model.rope.inv_freq
    return tree.train(model.training)
