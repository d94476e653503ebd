"""The feed-forward layer, with a gate (SwiGLU) or without. Source: Shazeer 2020, "GLU Variants Improve Transformer"."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from llama_mini.model.config import Activation, LlamaConfig
from llama_mini.model.linear import Linear
from llama_mini.model.norm_slots import BranchPlan, build_norm
from llama_mini.model.residual import Residual

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}


class FeedForward(Residual):
    """The feed-forward branch: down(act(gate(x)) · up(x)), or without a gate down(act(up(x)))."""

    def __init__(self, config: LlamaConfig, plan: BranchPlan) -> None:
        super().__init__(config, plan)
        self.activation = config.activation
        self.gate_proj = Linear(config.dim, config.hidden_dim, config.mlp_bias) if config.gated_mlp else None
        self.up_proj = Linear(config.dim, config.hidden_dim, config.mlp_bias)
        self.down_proj = Linear(config.hidden_dim, config.dim, config.mlp_bias)
        slots = (plan.gate, plan.up, plan.mid)
        self.gate_norm, self.up_norm, self.mid_norm = (build_norm(s, config.hidden_dim, config.norm_eps) for s in slots)

    def branch(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.down_proj(self.mid_norm(self.hidden(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, F)."""
        act = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return act(self.up_norm(self.up_proj(x)))
        return act(self.gate_norm(self.gate_proj(x))) * self.up_norm(self.up_proj(x))
