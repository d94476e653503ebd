"""Decides whether an operator may compute a norm: a norm by itself, or all the norms of whole layers.

It may for an RMSNorm whose settings the operators support, in a layer that has not changed since it was fused:
nothing inside it is hooked, swapped or being trained. Otherwise the modules run one by one, as in the plain model.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_, methodcaller
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama_mini.model.norm import RMSNorm
from llama_mini.optimize.packed_linear import needs_grad, supported

_SETTINGS = attrgetter("eps", "gain", "scale", "cast")
_WEIGHT, _DTYPE = methodcaller("get", "weight"), attrgetter("dtype")


class NormArgs(NamedTuple):
    """A norm as operator arguments. An empty gain means no norm."""

    gain: Tensor
    eps: float
    flags: int  # 1 for a late cast, 2 for a gain 1+w


NormLists = tuple[list[Tensor], list[float], list[int]]  # gains, eps and flags, one for each norm


class FusedRMSNorm(RMSNorm):
    """An RMSNorm of a fast model: the same module and the same numbers, by one operator where possible."""

    def forward(self, x: Tensor) -> Tensor:
        args = norm_args(self, x.dtype) if supported(x.dtype, x.device) and x.shape[-1:] == (self.dim,) else None
        if args is None or needs_grad(x) or needs_grad(args.gain):
            return super().forward(x)
        return torch.ops.llama_mini.rms_norm.default(x, *args)


def norm_args(norm: nn.Module, dtype: torch.dtype) -> NormArgs | None:
    """A norm as operator arguments; None if the operators cannot compute it for an input of this dtype."""
    if isinstance(norm, nn.Identity):
        return NormArgs(torch.empty(0, device="cpu"), 0.0, 0)
    if not isinstance(norm, RMSNorm) or type(norm) not in (RMSNorm, FusedRMSNorm):  # a subclass may compute anything
        return None
    weight = norm._parameters["weight"]
    if norm.scale != 1 or weight is None or weight.dtype != dtype:
        return None
    return NormArgs(weight, norm.eps, (norm.cast == "late") + 2 * (norm.gain == "1+w"))


class FusableNorms:
    """The norms of some layers as operator arguments, read again when a setting or a weight has changed.

    layers: those that the operator computes, with the modules that they hold now. norms: theirs, in its order.
    Every decoding step calls `args`, which compares whole lists: norm by norm it would take several times as long.
    """

    def __init__(self, layers: Iterable[nn.Module], norms: Sequence[nn.Module]) -> None:
        inside = [module for layer in layers for module in layer.modules()]
        self._hooks = [hooks for m in inside for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._children = [m._modules for m in inside if m._modules]
        self._fused_children = [dict(children) for children in self._children]
        self._all = norms
        self._norms = [norm for norm in norms if isinstance(norm, RMSNorm)]
        self._parameters = [norm._parameters for norm in self._norms]
        self._args: NormLists | None = None

    def args(self, dtype: torch.dtype) -> NormLists | None:
        """Gains, eps and flags of the norms; None if the layers must run module by module for such an input."""
        if any(self._hooks) or self._children != self._fused_children:
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in self._weights() if t is not None):
            return None
        if self._args is None or not self._still_valid(dtype):
            self._args = self._read(dtype)
        return self._args

    def _weights(self) -> list[Tensor | None]:
        return list(map(_WEIGHT, self._parameters))

    def _still_valid(self, dtype: torch.dtype) -> bool:
        """Whether settings and weights are still those of the last `_read`, and all weights have this dtype."""
        return (
            list(map(_SETTINGS, self._norms)) == self._settings
            and all(map(is_, self._weights(), self._read_weights))
            and {dtype}.issuperset(map(_DTYPE, self._read_weights))
        )

    def _read(self, dtype: torch.dtype) -> NormLists | None:
        self._settings, self._read_weights = list(map(_SETTINGS, self._norms)), self._weights()
        args = [each for norm in self._all if (each := norm_args(norm, dtype)) is not None]
        if len(args) < len(self._all):
            return None
        gains, eps, flags = map(list, zip(*args, strict=True))
        return gains, eps, flags
