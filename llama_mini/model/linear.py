"""The matrices of the model. Random weights keep the variance of the input.

A model is built on the meta device before its weights are read. There nothing is initialized: even on that device,
drawing random numbers makes PyTorch import modules for a second.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x · Wᵀ, plus a bias where the checkpoint has one; random: N(0, 1/fan_in), biases 0."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:
            return
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """One row for each token; random: N(0, 1)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def project(self, x: Tensor) -> Tensor:
        """The embedding as output head, in a model with tied embeddings: (..., C) -> (..., V)."""
        return F.linear(x, self.weight)
