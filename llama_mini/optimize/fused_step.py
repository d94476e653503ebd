"""A whole step of decoding in one operator: embedding, layers, last norm, head, and the choice of the likeliest token.

Between two operators Python and PyTorch take time. Their code is not in the caches any more after the weights were
read, and PyTorch's operators let go of Python's lock, which the threads of a server want too.
"""

import torch
from torch import Tensor, nn

from llama_mini.model.kv_cache import KVCache
from llama_mini.model.linear import Embedding
from llama_mini.model.llama import Llama
from llama_mini.model.norm import RMSNorm
from llama_mini.model.rope import Rope
from llama_mini.optimize.fusable import FusableNorms
from llama_mini.optimize.fused_layers import FusedEmbedding, FusedHead, FusedLayers, layer_args
from llama_mini.optimize.packed_linear import supported

TABLE_STEP = 1024  # positions, of which a multiple have their cosines and sines in the table


class FusedStep:
    """Steps of a fast model as it is now. It computes none while a module is hooked, or another than now."""

    def __init__(self, model: Llama) -> None:
        config, embedding, head = model.config, model.tok_embeddings, model.lm_head or model.tok_embeddings
        self._model, self._children, self._embedding = model, dict(model._modules), embedding
        self._head = head.head if isinstance(head, FusedEmbedding) else head
        fused = isinstance(model.layers, FusedLayers) and isinstance(self._head, FusedHead)
        norms = isinstance(model.embed_norm, nn.Identity) and isinstance(model.norm, RMSNorm)
        unscaled = config.embedding_scale == config.logit_scale == 1 and config.logit_softcap is None
        one_rotation = model.sliding_rope is None and not config.unrotated_layers
        known = isinstance(embedding, (FusedEmbedding, Embedding))
        self._supported = fused and norms and unscaled and one_rotation and known
        self._norm = FusableNorms([module for module in model.children() if module is not model.layers], [model.norm])
        self._inv_freq, self._rope = torch.empty(0, device="cpu"), tuple[Tensor, ...]()

    def __call__(self, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Tensor] | None:
        """The next tokens (N, 1) of a cache's rows -> logits (N, V), and the likeliest of each (N,).

        A row whose logits are not all finite has -1. None if the model must run module by module.
        """
        model, layers, dtype = self._model, self._model.layers, self._model.dtype
        if not self._supported or model._modules != self._children or not supported(dtype, model.device):
            return None
        assert isinstance(layers, FusedLayers)
        assert isinstance(self._head, FusedHead)
        rope, last, head = self._rotation(cache.read_length(1)), self._norm.args(dtype), self._head.linear
        if layers.whole is None or last is None or (norms := layers.whole.norms(dtype, rope)) is None:
            return None
        embedding = self._embedding
        rows = embedding.head.linear.tensors if isinstance(embedding, FusedEmbedding) else [embedding.weight]
        every = norms[0] + last[0], norms[1] + last[1], norms[2] + last[2]
        args = layer_args([layers.whole], [every], cache.layers(cache.positions(1)))
        of_head = head.tensors, head.bias_or_empty, head.width
        found: tuple[Tensor, Tensor] = torch.ops.llama_mini.step.default(tokens, rows, *rope, *args, *of_head)
        cache.advance(1)
        return found

    def _rotation(self, length: int) -> Rope:
        """Cosines and sines of `length` positions or more, (P, R/2) each: PyTorch's, whose last bits no other has."""
        rope = self._model.rope
        if not torch.equal(rope.inv_freq, self._inv_freq) or len(self._rope[0]) < length:
            positions = torch.arange(-(-length // TABLE_STEP) * TABLE_STEP, device="cpu")
            self._rope = tuple(each[0, :, 0] for each in rope(positions[None], cached=True))
            self._inv_freq = rope.inv_freq.clone()
        return self._rope
