"""All layers of a model in one operator where their norms let it: for a step of decoding, and for a prompt.

A step of a small model is over in two milliseconds, and a call from Python takes ten microseconds: so one call serves
each run of layers whose norms nobody watches or swaps, and the others run module by module between them.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller

import torch
from torch import Tensor, nn

from llama_mini.model.kv_cache import LayerCache
from llama_mini.model.llama import Layers, TransformerBlock
from llama_mini.model.norm import RMSNorm
from llama_mini.model.rope import Rope
from llama_mini.optimize.branches import FusedAttention, FusedFeedForward, Gain

_SETTINGS = attrgetter("eps", "gain", "scale", "cast")
_WEIGHT, _DTYPE = methodcaller("get", "weight"), attrgetter("dtype")


class FusedLayers(Layers):
    """The same blocks, their branches fused."""

    _all: "_Run | None"

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self._gather()

    def forward(self, x: Tensor, rope: Rope, masks: list[Tensor], kv: list[LayerCache] | None) -> Tensor:
        if kv is None or 1 not in x.shape[:2] or self._modules != self._as_made:
            return super().forward(x, rope, masks, kv)
        if self._all is not None and self._all.stands(x):
            return self._all(x, rope, kv)
        begin, gains = 0, list[list[Gain]]()
        for i, block in enumerate(self._blocks):
            found = block.gains(x)
            if found is None:
                x = self[i](_Run(self._blocks[begin:i], gains, x.dtype)(x, rope, kv[begin:i]), rope, masks[i], kv[i])
                begin, gains = i + 1, []
            else:
                gains.append(found)
        run = _Run(self._blocks[begin:], gains, x.dtype)
        if begin == 0:
            self._all = run
        return run(x, rope, kv[begin:])

    def _gather(self) -> None:
        self._as_made = dict(self._modules)
        self._blocks = [_Block(block) for block in self if isinstance(block, TransformerBlock)]
        self._all = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedLayers":
        super()._apply(fn, recurse)
        self._gather()  # the tensors are others now
        return self


class _Block:
    """What the operator needs of one block, looked up once."""

    def __init__(self, block: TransformerBlock) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        assert isinstance(attention, FusedAttention)
        assert isinstance(feed_forward, FusedFeedForward)
        self._block, self._attention, self._feed_forward = block, attention, feed_forward
        self.parts = (block, attention, feed_forward)
        self._as_made = dict(block._modules)
        self._hooks = [h for m in self.parts for h in (m._forward_pre_hooks, m._forward_hooks)]
        self.hooks = [*self._hooks, *attention.hooks, *feed_forward.hooks]
        self.heads, self.hidden, self.window = attention.n_heads, feed_forward.down_proj.columns, attention.window
        matrices = [attention.qkv_proj, attention.o_proj, feed_forward.gate_up_proj, feed_forward.down_proj]
        self.tensors = [tensor for matrix in matrices for tensor in matrix.tensors]
        self.biases = [matrix.bias_or_nothing for matrix in matrices]

    def gains(self, x: Tensor) -> list[Gain] | None:
        """Of the norms before attention, of q, of k, and before feed-forward; None where the block runs by itself."""
        if any(self._hooks) or self._block._modules != self._as_made:
            return None
        attention, feed_forward = self._attention.gains(x), self._feed_forward.gains(x)
        return None if attention is None or feed_forward is None else attention + feed_forward


class _Run:
    """Some layers that follow one another, as the operator takes them; of none it leaves x as it is."""

    def __init__(self, blocks: Sequence[_Block], gains: Sequence[list[Gain]], dtype: torch.dtype) -> None:
        self._blocks, self._dtype = blocks, dtype
        self._gain, self._eps, self._late = (
            map(list, zip(*chain.from_iterable(gains), strict=True)) if gains else ([],) * 3
        )
        self._tensors = [tensor for block in blocks for tensor in block.tensors]
        biases = [bias for block in blocks for bias in block.biases]
        self._biases = biases if any(map(torch.numel, biases)) else []  # each tensor handed over takes its time
        self._windows = [block.window for block in blocks]
        # What `stands` looks at: lists of what is there, beside what was there.
        self._hooks = [hooks for block in blocks for hooks in block.hooks]
        self._trees = [part._modules for block in blocks for part in block.parts]
        self._trees_then = [dict(tree) for tree in self._trees]
        self._norms = [norm for tree in self._trees for norm in tree.values() if isinstance(norm, RMSNorm)]
        self._parameters = [norm._parameters for norm in self._norms]
        self._weights = list(map(_WEIGHT, self._parameters))
        self._settings = list(map(_SETTINGS, self._norms))

    def __call__(self, x: Tensor, rope: Rope, caches: Sequence[LayerCache]) -> Tensor:
        if not self._blocks:
            return x
        return torch.ops.llama_mini.layers.default(
            x,
            *rope,
            caches[0].positions,
            [cache.k for cache in caches],
            [cache.v for cache in caches],
            self._gain,
            self._eps,
            self._late,
            self._tensors,
            self._biases,
            self._windows,
            self._blocks[0].heads,
            self._blocks[0].hidden,
        )

    def stands(self, x: Tensor) -> bool:
        """Whether no norm has been watched, swapped or set otherwise since: a look at each by itself takes longer."""
        return not (
            torch.is_grad_enabled()
            or x.dtype != self._dtype
            or not x.is_contiguous()
            or any(self._hooks)
            or self._trees != self._trees_then
            or list(map(_SETTINGS, self._norms)) != self._settings
            or not all(map(is_, map(_WEIGHT, self._parameters), self._weights))
            or not {self._dtype}.issuperset(map(_DTYPE, self._weights))
        )
