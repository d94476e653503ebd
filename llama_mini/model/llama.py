"""The whole model: tokens to logits on one screen, helpers below."""

from pathlib import Path
from typing import NoReturn, Self

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.model.attention import Attention, causal_mask, within_window
from llama_mini.model.config import LlamaConfig
from llama_mini.model.feed_forward import FeedForward
from llama_mini.model.kv_cache import KVCache, LayerCache
from llama_mini.model.linear import Embedding, Linear
from llama_mini.model.norm_slots import build_norm
from llama_mini.model.rope import Rope, RotaryEmbedding


class Llama(nn.Module):
    """A LLaMA: embedding, residual layers, final norm, head. The config's plan says where the norms sit.

    `Llama(config)` is random: embedding N(0, 1), matrices N(0, 1/fan_in), gains 1.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.embed_norm = build_norm(config.norm_plan.embed, config.dim, config.norm_eps)
        self.layers = Layers(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = build_norm(config.norm_plan.final, config.dim, config.norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.dim, config.vocab_size)
        self.rope = RotaryEmbedding(config)
        self.sliding_rope = None if config.sliding_rope_theta is None else RotaryEmbedding(config, sliding=True)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Next-token logits. tokens (B, T) int64 -> (B, T, V) float32 (float64 for a float64 model).

        With a cache, the tokens continue its rows and are appended to it. Raises CapacityError if they do not fit.
        """
        return self.logits(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The last hidden states, (B, T, C). The bookkeeping is here, the arithmetic in `trunk`."""
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64:
            is_tensor = isinstance(tokens, Tensor)
            found = f"{tuple(tokens.shape)} {tokens.dtype}" if is_tensor else f"a {type(tokens).__name__}"
            raise RequestError(f"tokens must be (batch, length) int64, not {found}")
        n_new = tokens.shape[1]
        if cache is None:
            positions = torch.arange(n_new, device=tokens.device)[None]
            return self.trunk(tokens, positions, causal_mask(positions, n_new), None)
        if cache.batch != tokens.shape[0]:
            raise RequestError(f"{tokens.shape[0]} rows of tokens for a cache of {cache.batch} rows")
        positions = cache.positions(n_new)
        mask = causal_mask(positions, cache.read_length(n_new))
        x = self.trunk(tokens, positions, mask, cache.layers(positions))
        cache.advance(n_new)
        return x

    def trunk(self, tokens: Tensor, positions: Tensor, mask: Tensor, kv: list[LayerCache] | None) -> Tensor:
        """Tensors in, tensors out: the one function that is run eagerly, captured or exported."""
        ropes, masks = self.by_layer(positions, mask, cached=kv is not None)
        x = self.embed_norm(self.embed(tokens))  # (B, T, C)
        return self.norm(self.layers(x, ropes, masks, kv))

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, C), scaled."""
        x, scale = self.tok_embeddings(tokens), self.config.embedding_scale
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype, device="cpu")

    def by_layer(self, positions: Tensor, mask: Tensor, cached: bool) -> tuple[list[Rope | None], list[Tensor]]:
        """The rotation of each layer, None for a layer without, and its mask."""
        config, sliding = self.config, self.config.sliding_layers
        rope = near_rope = self.rope(positions, cached)
        if self.sliding_rope is not None:
            near_rope = self.sliding_rope(positions, cached)
        near = mask if config.sliding_window is None else within_window(mask, positions, config.sliding_window)
        ropes = [near_rope if i in sliding else rope for i in range(config.n_layers)]
        for i in config.unrotated_layers:
            ropes[i] = None
        return ropes, [near if i in sliding else mask for i in range(config.n_layers)]

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        y = self.tok_embeddings.project(x) if self.lm_head is None else self.lm_head(x)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        if self.config.logit_scale != 1:
            y = y * self.config.logit_scale
        cap = self.config.logit_softcap
        return y if cap is None else cap * torch.tanh(y / cap)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `batch` rows of `length` positions, on the model's device and in its dtype."""
        return KVCache(self.config, batch, length, dtype=self.dtype, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.tok_embeddings.dtype

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.device

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """Opens a checkpoint: a directory, a GGUF or safetensors file, or a hub name (org/name, org/name@revision).

        The model is in eval mode, without gradients. `dtype=None` keeps the file's; quantised blocks become bfloat16.

        Raises CheckpointError, ConfigError; CapacityError, before any data is read, if it does not fit in memory.
        """
        from llama_mini.checkpoint.load import load_model  # late: nothing else in model/ imports the folders above it
        from llama_mini.checkpoint.open import open_checkpoint, resolve

        return load_model(cls, open_checkpoint(resolve(path)), dtype, device)

    def generate(self, *_: object, **__: object) -> NoReturn:
        """Says that `LLM` generates, since callers know this method from transformers."""
        raise RequestError("a Llama maps tokens to logits; llama_mini.LLM(path).generate(prompts) generates text")

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a directory that `from_pretrained` reads; it is complete or not there at all.

        Raises CheckpointPathError; RequestError for a model that is edited, hooked or optimized, or that lacks values.
        """
        from llama_mini.checkpoint.load import save_model

        save_model(self, Path(path))


class Layers(nn.ModuleList):
    """The layers in order: (B, T, C) -> (B, T, C). Each gets its own rotation, mask and part of the KVCache."""

    def forward(self, x: Tensor, ropes: list[Rope | None], masks: list[Tensor], kv: list[LayerCache] | None) -> Tensor:
        for i, layer in enumerate(self):
            x = layer(x, ropes[i], masks[i], None if kv is None else kv[i])
        return x


class TransformerBlock(nn.Module):
    """One layer: two residual branches. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        attention, feed_forward = config.norm_plan.layer(index)
        self.attention = Attention(config, attention)
        self.feed_forward = FeedForward(config, feed_forward)
        self.parallel = config.norm_plan.parallel

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor, kv: LayerCache | None) -> Tensor:
        if not self.parallel:
            return self.feed_forward(self.attention(x, rope, mask, kv))
        h = self.attention.pre_norm(x)  # both branches read it
        return self.feed_forward(self.attention(x, rope, mask, kv, normed=h), normed=self.feed_forward.pre_norm(h))
