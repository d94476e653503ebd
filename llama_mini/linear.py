"""The matrices of the model. Random ones keep the variance of a unit input.

On the meta device, where a checkpoint's model is born, nothing is drawn: PyTorch would import for a second to do it.
"""

from torch import nn


class Linear(nn.Linear):
    """x · Wᵀ, without a bias; random: N(0, 1/fan_in)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=self.in_features**-0.5)


class Embedding(nn.Embedding):
    """Rows of a table; random: N(0, 1)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)
