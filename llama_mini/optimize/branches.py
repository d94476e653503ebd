"""Attention and feed-forward with fused projections, and when an operator may stand for their norms.

It stands only for norms that it computes exactly, while nobody watches or swaps one; any other branch runs module by
module, as in the plain model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_mini.model.attention import Attention
from llama_mini.model.feed_forward import FeedForward
from llama_mini.model.norm import RMSNorm
from llama_mini.model.residual import Residual
from llama_mini.optimize.matrix import Matrix, served, tracked

MakeMatrix = Callable[[Sequence[nn.Linear]], Matrix]
_EMPTY = ("out_norm", "post_norm", "mid_norm", "v_norm")  # slots that no operator fills


class Gain(NamedTuple):
    """A norm as the operators take it; an empty gain where the slot is."""

    gain: Tensor
    eps: float
    late: int


def gain_of(norm: nn.Module | None, x: Tensor) -> Gain | None:
    """None where the operators would not do to x what the norm does."""
    if type(norm) is not RMSNorm or norm.gain != "w" or norm.scale != 1:
        return None
    weight = norm._parameters["weight"]
    if weight is None or weight.dtype != x.dtype or tracked(weight):
        return None
    return Gain(weight, norm.eps, int(norm.cast == "late"))


def normed(norm: RMSNorm, x: Tensor) -> Tensor | None:
    """The norm's `operator`: its output, or None where its own forward must give it."""
    gain = gain_of(norm, x)
    if gain is None or tracked(x) or not served(x.dtype, x.device) or x.shape[-1:] != (norm.dim,):
        return None
    return torch.ops.llama_mini.rms_norm.default(x, *gain)


class FusedBranch(Residual):
    """What both branches share: the plain branch's norms, the same modules, and when operators may stand for them."""

    def take_over(self, plain: Residual, matrices: dict[str, Matrix], slots: Sequence[str]) -> None:
        """Becomes `plain` with `matrices` in place of its projections. `slots`: norms that operators compute."""
        nn.Module.__init__(self)
        for name, value in vars(plain).items():
            if name not in vars(self):
                setattr(self, name, value)
        for name, module in plain.named_children():
            if not isinstance(module, nn.Linear):
                self.add_module(name, module)
        for name, module in matrices.items():
            self.add_module(name, module)
        self._slots, self._no_gain = slots, Gain(torch.empty(0), 0.0, 0)
        kernels = all(matrix.kernels for matrix in matrices.values())
        empty = all(isinstance(self._modules.get(name, nn.Identity()), nn.Identity) for name in _EMPTY)
        self._served = kernels and empty and self.alpha == 1 and self.beta == 1
        self._as_made = dict(self._modules)
        inside = [module for child in self.children() for module in child.modules()]
        self.hooks = [hooks for m in inside for hooks in (m._forward_pre_hooks, m._forward_hooks)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedBranch":
        super()._apply(fn, recurse)
        self._served &= all(matrix.kernels for matrix in self.children() if isinstance(matrix, Matrix))
        return self

    def gains(self, x: Tensor) -> list[Gain] | None:
        """The branch's norms for the operators, read anew each time; None where they would not do what modules do."""
        if not self._served or self._modules != self._as_made or any(self.hooks):
            return None
        if not x.is_contiguous() or tracked(x):
            return None
        found = []
        for slot in self._slots:
            norm = self._modules[slot]
            gain = self._no_gain if type(norm) is nn.Identity else gain_of(norm, x)
            if gain is None:
                return None
            found.append(gain)
        return found


class FusedAttention(FusedBranch, Attention):
    """Attention whose q, k and v are one matrix. `window`: positions that this layer sees; 0 for all."""

    qkv_proj: Matrix
    o_proj: Matrix  # type: ignore[assignment]

    def __init__(self, plain: Attention, make: MakeMatrix, window: int) -> None:
        matrices = {"qkv_proj": make([plain.q_proj, plain.k_proj, plain.v_proj]), "o_proj": make([plain.o_proj])}
        self.take_over(plain, matrices, ("pre_norm", "q_norm", "k_norm"))
        self.window = window
        self._served &= self.q_view[0] == self.n_heads and self.k_view[0] == self.n_kv_heads  # not over all heads

    def project(self, x: Tensor) -> Sequence[Tensor]:
        return self.qkv_proj.split(self.qkv_proj(x))


class FusedFeedForward(FusedBranch, FeedForward):
    """SwiGLU whose gate and up are one matrix."""

    gate_up_proj: Matrix
    down_proj: Matrix  # type: ignore[assignment]

    def __init__(self, plain: FeedForward, make: MakeMatrix) -> None:
        matrices = {"gate_up_proj": make([plain.gate_proj, plain.up_proj]), "down_proj": make([plain.down_proj])}
        self.take_over(plain, matrices, ("pre_norm",))

    def gated(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj.split(self.gate_up_proj(x))
        return F.silu(gate) * up
