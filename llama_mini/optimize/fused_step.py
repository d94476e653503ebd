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
        known = isinstance(embedding, (FusedEmbedding, Embedding))
        self._supported = fused and norms and known
        self._scales = config.embedding_scale, config.logit_scale, config.logit_softcap or 0.0
        self._norm = FusableNorms([module for module in model.children() if module is not model.layers], [model.norm])
        self._frequencies, self._ropes = list[Tensor](), list[Rope | None]()

    def __call__(self, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Tensor] | None:
        """The next tokens (N, 1) of a cache's rows -> logits (N, V), and the likeliest of each (N,).

        A row whose logits are not all finite has -1. None if the model must run module by module.
        """
        model, layers, dtype = self._model, self._model.layers, self._model.dtype
        if not self._supported or model._modules != self._children or not supported(dtype, model.device):
            return None
        assert isinstance(layers, FusedLayers)
        assert isinstance(self._head, FusedHead)
        ropes, last, head = self._rotations(cache.read_length(1)), self._norm.args(dtype), self._head.linear
        if layers.whole is None or last is None or (norms := layers.whole.norms(dtype, ropes)) is None:
            return None
        embedding = self._embedding
        rows = embedding.head.linear.tensors if isinstance(embedding, FusedEmbedding) else [embedding.weight]
        every = norms[0] + last[0], norms[1] + last[1], norms[2] + last[2]
        args = layer_args([layers.whole], [every], ropes, cache.layers(cache.positions(1)))
        of_head = head.tensors, head.bias_or_empty, head.width
        found: tuple[Tensor, Tensor] = torch.ops.llama_mini.step.default(tokens, rows, *args, *of_head, *self._scales)
        cache.advance(1)
        return found

    def _rotations(self, length: int) -> list[Rope | None]:
        """Of each layer, cosines and sines of `length` positions or more, (P, R/2): PyTorch's own."""
        model, config = self._model, self._model.config
        rotaries = [rotary for rotary in (model.rope, model.sliding_rope) if rotary is not None]
        same = len(rotaries) == len(self._frequencies) and all(
            torch.equal(rotary.inv_freq, old) for rotary, old in zip(rotaries, self._frequencies, strict=True)
        )
        longest = next((len(rope[0]) for rope in self._ropes if rope is not None), length)
        if not same or longest < length:
            positions = torch.arange(-(-length // TABLE_STEP) * TABLE_STEP, device="cpu")[None]
            tables = [tuple(each[0, :, 0] for each in rotary(positions, cached=True)) for rotary in rotaries]
            by_layer = [tables[-1] if i in config.sliding_layers else tables[0] for i in range(config.n_layers)]
            self._ropes = [None if i in config.unrotated_layers else rope for i, rope in enumerate(by_layer)]
            self._frequencies = [rotary.inv_freq.clone() for rotary in rotaries]
        return self._ropes
