"""What the operators give back, by shape and dtype alone: with this they export and compile."""

import torch
from torch import Tensor
from torch.library import register_fake


@register_fake("llama_mini::layers")
def _layers(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("llama_mini::project")
def _project(x: Tensor, w: list[Tensor], bias: Tensor, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows, dtype=torch.float32)


@register_fake("llama_mini::product")
def _product(x: Tensor, w: list[Tensor], bias: Tensor, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@register_fake("llama_mini::attend")
def _attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    gains: list[Tensor],
    eps: list[float],
    late: list[int],
    window: int,
    heads: int,
    codes: bool,
) -> Tensor:
    return qkv.new_empty(1, qkv.shape[1], heads * k_cache.shape[3])


@register_fake("llama_mini::rms_norm")
def _rms_norm(x: Tensor, gain: Tensor, eps: float, late: bool) -> Tensor:
    return x.new_empty(x.shape)  # rows that touch, however x lies


@register_fake("llama_mini::swiglu")
def _swiglu(gate_up: Tensor, hidden: int, up_at: int) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], hidden)


@register_fake("llama_mini::widen")
def _widen(w: list[Tensor], first: int, out: Tensor, rows: int) -> None:
    return None
