"""SwiGLU feed-forward. Source: Shazeer 2020, "GLU Variants Improve Transformer"."""

import torch.nn.functional as F
from torch import Tensor

from llama_mini.model.config import LlamaConfig
from llama_mini.model.linear import Linear
from llama_mini.model.norm_slots import BranchPlan, build_norm
from llama_mini.model.residual import Residual


class FeedForward(Residual):
    """The feed-forward branch: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, plan: BranchPlan) -> None:
        super().__init__(config, plan)
        self.gate_proj = Linear(config.dim, config.hidden_dim, config.mlp_bias)
        self.up_proj = Linear(config.dim, config.hidden_dim, config.mlp_bias)
        self.down_proj = Linear(config.hidden_dim, config.dim, config.mlp_bias)
        self.mid_norm = build_norm(plan.mid, config.hidden_dim, config.norm_eps)

    def branch(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.down_proj(self.mid_norm(self.gated(x)))

    def gated(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, F)."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)
