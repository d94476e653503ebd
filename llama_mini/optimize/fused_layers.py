"""Layers in one operator, for a decoding step or a prompt; the head; and the tied embedding.

A step of a small model takes two milliseconds, and a call from Python ten microseconds. So one call computes
as many consecutive layers as the operator may; the layers between such runs go module by module.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.model.kv_cache import LayerCache
from llama_mini.model.llama import Layers, TransformerBlock
from llama_mini.model.rope import Rope
from llama_mini.optimize.fusable import FusableNorms, NormLists
from llama_mini.optimize.fused_branches import OPERATOR_ACTIVATIONS, FusedAttention, FusedFeedForward
from llama_mini.optimize.packed_linear import PackedLinear, decodes, needs_grad


class FusedLayers(Layers):
    """The same blocks, with fused branches."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self._gather()

    def forward(self, x: Tensor, ropes: list[Rope | None], masks: list[Tensor], kv: list[LayerCache] | None) -> Tensor:
        whole = self.whole
        if kv is None or whole is None or 1 not in x.shape[:2]:
            return super().forward(x, ropes, masks, kv)
        if _fits(x) and (norms := whole.norms(x.dtype, ropes)) is not None:
            return _run([whole], [norms], x, ropes, kv)
        begin, pending = 0, list[NormLists]()  # norms of the layers from `begin` on, which the next call computes
        for i, layer in enumerate(self._each):
            norms = layer.norms(x.dtype, ropes[i : i + 1]) if _fits(x) else None
            if norms is not None:
                pending.append(norms)
                continue
            x = _run(self._each[begin:i], pending, x, ropes[begin:i], kv[begin:i])
            x = self[i](x, ropes[i], masks[i], kv[i])
            begin, pending = i + 1, []
        return _run(self._each[begin:], pending, x, ropes[begin:], kv[begin:])

    @property
    def whole(self) -> "LayerOperands | None":
        """The arguments for all layers; None if one of them was swapped."""
        return self._whole if self._modules == self._fused_children else None

    def _gather(self) -> None:
        self._fused_children = dict(self._modules)
        bias = any(isinstance(module, PackedLinear) and module.bias is not None for module in self.modules())
        self._whole, self._each = LayerOperands([*self], bias), [LayerOperands([block], bias) for block in self]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedLayers":
        super()._apply(fn, recurse)
        self._gather()  # .to() makes new tensors
        return self


class LayerOperands:
    """The operator's arguments for consecutive layers, gathered once: building the lists takes as long as a layer."""

    def __init__(self, blocks: Sequence[nn.Module], bias: bool) -> None:
        attentions, feed_forwards = list[FusedAttention](), list[FusedFeedForward]()
        for block in blocks:
            assert isinstance(block, TransformerBlock)
            assert isinstance(block.attention, FusedAttention)
            assert isinstance(block.feed_forward, FusedFeedForward)
            attentions.append(block.attention)
            feed_forwards.append(block.feed_forward)
        branches = [branch for pair in zip(attentions, feed_forwards, strict=True) for branch in pair]
        linears = [matrix for branch in branches for linear in branch.linears for matrix in linear.matrices]
        self._supported = all(branch.supported for branch in branches) and not any(block.parallel for block in blocks)
        self._norms = FusableNorms(blocks, [norm for branch in branches for norm in branch.norms])
        self.weights = [tensor for linear in linears for tensor in linear.tensors]
        self.biases = [linear.bias_or_empty for linear in linears] if bias else []  # empty tensors take time too
        self.settings = [number for pair in zip(attentions, feed_forwards, strict=True) for number in _settings(*pair)]
        self.scales = [scale for branch in branches for scale in branch.scales]
        self.heads, self.hidden_dim = attentions[0].n_heads, feed_forwards[0].down_proj.columns

    def norms(self, dtype: torch.dtype, ropes: Sequence[Rope | None]) -> NormLists | None:
        """The norms' arguments for an input of this dtype; None if these layers must run module by module.

        The operator does not scale the queries by their positions.
        """
        plain = all(rope is None or len(rope) == 2 for rope in ropes)
        return self._norms.args(dtype) if self._supported and plain else None


def _settings(attention: FusedAttention, feed_forward: FusedFeedForward) -> tuple[int, int, int, int]:
    """Window, activation, rotation and `apart` of a layer.

    An activation that no operator has makes the layer unsupported.
    """
    known = feed_forward.activation in OPERATOR_ACTIVATIONS
    return attention.window, OPERATOR_ACTIVATIONS.index(feed_forward.activation) if known else 0, 0, attention.apart


def _run(
    layers: Sequence[LayerOperands],
    norms: Sequence[NormLists],
    x: Tensor,
    ropes: Sequence[Rope | None],
    caches: Sequence[LayerCache],
) -> Tensor:
    """x (B, T, C) through consecutive layers; x itself if there are none."""
    return torch.ops.llama_mini.layers.default(x, *layer_args(layers, norms, ropes, caches)) if layers else x


def layer_args(
    layers: Sequence[LayerOperands],
    norms: Sequence[NormLists],
    ropes: Sequence[Rope | None],
    caches: Sequence[LayerCache],
) -> tuple[Any, ...]:
    """What the operators take for consecutive layers, from `ropes` to `hidden`."""
    each = {id(rope): rope for rope in ropes if rope is not None}
    settings = _joined([layer.settings for layer in layers])
    if len(each) != 1 or any(rope is None for rope in ropes):
        numbers = dict(zip(each, range(len(each)), strict=True))
        settings = list(settings)
        settings[2::4] = [numbers.get(id(rope), -1) for rope in ropes]
    windows = settings[::4]
    return (
        [angles for rope in each.values() for angles in rope],
        [caches[windows.index(window)].pages for window in sorted(set(windows))],  # without a window, and with one
        caches[0].positions,
        [cache.k for cache in caches],
        [cache.v for cache in caches],
        *map(_joined, zip(*norms, strict=True)),
        _joined([layer.weights for layer in layers]),
        _joined([layer.biases for layer in layers]),
        settings,
        _joined([layer.scales for layer in layers]),
        layers[0].heads,
        layers[0].hidden_dim,
    )


def _fits(x: Tensor) -> bool:
    """Whether the operator may take x."""
    return x.is_contiguous() and not needs_grad(x)


def _joined(lists: Sequence[list[Any]]) -> list[Any]:
    return lists[0] if len(lists) == 1 else list(chain.from_iterable(lists))


class FusedHead(nn.Module):
    """Hidden states (..., C) -> logits (..., V). For tokens that decode they are gemv's float32."""

    def __init__(self, linear: PackedLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        if linear.kernels and decodes(x) and not needs_grad(x):
            return torch.ops.llama_mini.gemv(x, linear.tensors, linear.bias_or_empty, linear.width)
        return linear(x)


class FusedEmbedding(nn.Module):
    """tokens (B, T) -> (B, T, C), and the tied head: one stored matrix serves both."""

    def __init__(self, linear: PackedLinear) -> None:
        super().__init__()
        self.head = FusedHead(linear)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.linear.dtype

    @property
    def device(self) -> torch.device:
        return self.head.linear.tensors[0].device

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head.linear.lookup(tokens)

    def project(self, x: Tensor) -> Tensor:
        return self.head(x)
