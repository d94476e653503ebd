"""A residual branch and the norm slots around it."""

import torch
from torch import Tensor, nn

from llama_mini.model.config import LlamaConfig
from llama_mini.model.norm_slots import BranchPlan, build_norm


class Residual(nn.Module):
    """α·x + β·branch(x), with norms before the branch, on its output, or after the sum, as the plan says.

    Shape: (B, T, C) -> (B, T, C). `normed`: what the branch reads in the place of pre_norm(x); parallel layers give it.
    """

    def __init__(self, config: LlamaConfig, plan: BranchPlan) -> None:
        super().__init__()
        self.pre_norm = build_norm(plan.pre, config.dim, config.norm_eps)
        self.out_norm = build_norm(plan.out, config.dim, config.norm_eps)
        self.post_norm = build_norm(plan.post, config.dim, config.norm_eps)
        self.alpha: float | nn.Parameter = plan.alpha
        self.beta: float | nn.Parameter = plan.beta
        if plan.learned:
            self.alpha, self.beta = (nn.Parameter(torch.full((1,), float(scale))) for scale in (plan.alpha, plan.beta))

    def forward(self, x: Tensor, *context: object, normed: Tensor | None = None) -> Tensor:
        h = self.pre_norm(x) if normed is None else normed
        return self.post_norm(self.add(x, self.out_norm(self.branch(h, *context))))

    def branch(self, x: Tensor, *context: object) -> Tensor:
        raise NotImplementedError

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return _times(self.alpha, x) + _times(self.beta, y)


def _times(scale: float | Tensor, x: Tensor) -> Tensor:
    return scale * x if isinstance(scale, Tensor) or scale != 1 else x
