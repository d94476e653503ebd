"""Grouped-query attention with rotary positions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_mini.model.config import LlamaConfig
from llama_mini.model.kv_cache import LayerCache
from llama_mini.model.linear import Linear
from llama_mini.model.norm_slots import BranchPlan, NormSpec, build_norm
from llama_mini.model.residual import Residual
from llama_mini.model.rope import Rope, apply_rope


class Attention(Residual):
    """The attention branch: H query heads share K key and value heads."""

    def __init__(self, config: LlamaConfig, plan: BranchPlan) -> None:
        super().__init__(config, plan)
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, q_dim, config.qkv_bias)
        self.k_proj = Linear(config.dim, kv_dim, config.qkv_bias)
        self.v_proj = Linear(config.dim, kv_dim, config.qkv_bias)
        self.o_proj = Linear(q_dim, config.dim, config.o_bias)
        self.q_norm, self.q_view = self._head_norm(plan.q, config.n_heads, config)
        self.k_norm, self.k_view = self._head_norm(plan.k, config.n_kv_heads, config)
        self.v_norm, self.v_view = self._head_norm(plan.v, config.n_kv_heads, config)
        self.mid_norm = build_norm(plan.mid, q_dim, config.norm_eps)
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.norm_after_rope = config.qk_norm_after_rope

    @staticmethod
    def _head_norm(spec: NormSpec | None, heads: int, config: LlamaConfig) -> tuple[nn.Module, tuple[int, ...]]:
        """The norm of a q, k or v slot, and the shape it norms: (H, D), each head, or (H·D,), the whole projection."""
        full = spec is not None and spec.view == "full"
        view = (heads * config.head_dim,) if full else (heads, config.head_dim)
        return build_norm(spec, view[-1], config.norm_eps), view

    def branch(self, x: Tensor, rope: Rope | None, mask: Tensor, kv: LayerCache | None) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x, rope)
        if kv is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = kv.append(k, v, mask.shape[-1])  # (B, K, S, D)
        y = self.attend(q.transpose(1, 2), k, v, mask)  # (B, H, T, D)
        return self.o_proj(self.mid_norm(y.transpose(1, 2).flatten(2)))

    def qkv(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> queries (B, T, H, D), keys and values (B, T, K, D); normed, and q and k rotated."""
        q, k, v = self.project(x)
        q = self.heads(q, self.q_norm, self.q_view, rope)
        if rope is not None and len(rope) == 3:
            q = q * rope[2].to(q.dtype)
        k = self.heads(k, self.k_norm, self.k_view, rope)
        return q, k, self.heads(v, self.v_norm, self.v_view, None)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """(B, T, C) -> q (B, T, H·D), k and v (B, T, K·D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, x: Tensor, norm: nn.Module, view: tuple[int, ...], rope: Rope | None) -> Tensor:
        """A projection (B, T, heads·D) -> (B, T, heads, D), normed and rotated."""
        per_head = (*x.shape[:-1], -1, self.head_dim)
        if self.norm_after_rope and rope is not None:
            x, rope = apply_rope(x.view(per_head), rope), None
        x = norm(x.reshape(*per_head[:-2], *view)).view(per_head)
        return x if rope is None else apply_rope(x, rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Queries (B, H, T, D) attend to S keys and values (B, K, S, D): (B, H, T, D)."""
        if self.softcap is not None:  # the operator has no cap: it takes the scores as its mask, and its own are zero
            q, mask = torch.zeros_like(q), self.capped_scores(q, k, mask, self.softcap)
        # Never is_causal: it aligns the triangle top-left, which is wrong as soon as keys outnumber queries.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=self.scale)

    def capped_scores(self, q: Tensor, k: Tensor, mask: Tensor, cap: float) -> Tensor:
        """c·tanh(scale·q·k / c) in float32, and -inf where the mask is False: (B, H, T, S)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        grouped = q.to(wide).unflatten(1, (self.n_kv_heads, -1)).flatten(2, 3)  # (B, K, H/K·T, D)
        scores = (grouped * (scale / cap)) @ k.to(wide).transpose(2, 3)
        scores = torch.tanh(scores)  # one name: two of them are alive at a time, and they are large
        scores = cap * scores.view(*q.shape[:-1], -1)
        return scores.masked_fill(~mask, -torch.inf)


def causal_mask(positions: Tensor, length: int) -> Tensor:
    """(B, T) -> (B, 1, T, S) bool: each token attends to every position up to its own."""
    return torch.arange(length, device=positions.device) <= positions[:, None, :, None]


def within_window(mask: Tensor, positions: Tensor, window: int) -> Tensor:
    """The mask, limited to the last `window` positions of each token, its own included."""
    near = torch.arange(mask.shape[-1], device=mask.device) > positions[:, None, :, None] - window
    return mask & near
