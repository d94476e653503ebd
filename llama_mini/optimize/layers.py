"""All layers of a model in one operator where their norms let it: for a step of decoding, and for a prompt in codes.

A step of a small model is over in two milliseconds, and a call from Python takes ten microseconds: so one call serves
each run of layers whose norms nobody watches or swaps, and the others run module by module between them.
"""

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from llama_mini.kv_cache import LayerCache
from llama_mini.model import Layers, TransformerBlock
from llama_mini.optimize.branches import FusedAttention, FusedFeedForward, Gain
from llama_mini.rope import Rope

Run = list[tuple["_Block", LayerCache, list[Gain]]]


class FusedLayers(Layers):
    """The same blocks, their branches fused."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self._gather()

    def forward(self, x: Tensor, rope: Rope, masks: list[Tensor], kv: list[LayerCache] | None) -> Tensor:
        served = x.shape[1] == 1 or (x.shape[0] == 1 and self._many)
        if kv is None or not served or self._modules != self._as_made:
            return super().forward(x, rope, masks, kv)
        run: Run = []
        for i, block in enumerate(self._blocks):
            gains = block.gains(x)
            if gains is None:
                x = self[i](_step(x, rope, run), rope, masks[i], kv[i])
                run = []
            else:
                run.append((block, kv[i], gains))
        return _step(x, rope, run)

    def _gather(self) -> None:
        self._as_made = dict(self._modules)
        self._blocks = [_Block(block) for block in self if isinstance(block, TransformerBlock)]
        self._many = all(block.many for block in self._blocks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedLayers":
        super()._apply(fn, recurse)
        self._gather()  # the tensors are others now
        return self


def _step(x: Tensor, rope: Rope, run: Run) -> Tensor:
    """A run of layers that follow one another; none leaves x as it is."""
    if not run:
        return x
    blocks, caches, gains = zip(*run, strict=True)
    gain, eps, late = zip(*chain.from_iterable(gains), strict=True)
    return torch.ops.llama_mini.layers.default(
        x,
        *rope,
        caches[0].positions,
        [cache.k for cache in caches],
        [cache.v for cache in caches],
        gain,
        eps,
        late,
        [tensor for block in blocks for tensor in block.tensors],
        [bias for block in blocks for bias in block.biases],
        [block.window for block in blocks],
        blocks[0].heads,
        blocks[0].hidden,
    )


class _Block:
    """What the operator needs of one block, looked up once."""

    def __init__(self, block: TransformerBlock) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        assert isinstance(attention, FusedAttention)
        assert isinstance(feed_forward, FusedFeedForward)
        self._block, self._attention, self._feed_forward = block, attention, feed_forward
        self._as_made = dict(block._modules)
        self._hooks = [h for m in (block, attention, feed_forward) for h in (m._forward_pre_hooks, m._forward_hooks)]
        self.heads, self.hidden, self.window = attention.n_heads, feed_forward.down_proj.columns, attention.window
        matrices = [attention.qkv_proj, attention.o_proj, feed_forward.gate_up_proj, feed_forward.down_proj]
        self.tensors = [tensor for matrix in matrices for tensor in matrix.tensors]
        self.many = all(matrix.many_kernels for matrix in matrices)
        self.biases = [matrix.bias_or_nothing for matrix in matrices]

    def gains(self, x: Tensor) -> list[Gain] | None:
        """Of the norms before attention, of q, of k, and before feed-forward; None where the block runs by itself."""
        if any(self._hooks) or self._block._modules != self._as_made:
            return None
        attention, feed_forward = self._attention.gains(x), self._feed_forward.gains(x)
        return None if attention is None or feed_forward is None else attention + feed_forward
