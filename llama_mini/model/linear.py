"""The matrices of the model. Random ones keep the variance of a unit input.

On the meta device, where a checkpoint's model is born, nothing is drawn: PyTorch would import for a second to do it.
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
    """Rows of a table; random: N(0, 1)."""

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
        """As the head of a model that ties the two: (..., C) -> (..., V)."""
        return F.linear(x, self.weight)
