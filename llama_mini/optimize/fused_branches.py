"""Attention and feed-forward with fused projections: q, k and v are one matrix, and so are gate and up."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llama_mini.model.attention import Attention
from llama_mini.model.feed_forward import ACTIVATIONS, FeedForward
from llama_mini.model.kv_cache import LayerCache
from llama_mini.model.residual import Residual
from llama_mini.model.rope import Rope
from llama_mini.optimize.packed_linear import PackedLinear, needs_grad

MakeLinear = Callable[[Sequence[nn.Linear]], PackedLinear]
OPERATOR_ACTIVATIONS = ("silu", "gelu_tanh")  # by their number for the operators
# Slots whose norms no operator computes.
_UNSUPPORTED = ("mid_norm", "v_norm", "gate_norm", "up_norm")


class FusedBranch(Residual):
    """The base of both branches. It keeps the plain branch's norms: the same modules, not copies."""

    norm_slots: ClassVar[tuple[str, ...]]  # of the norms that the operator computes, in its order

    def adopt(self, plain: Residual, linears: dict[str, PackedLinear]) -> None:
        """Becomes `plain` with `linears` in place of its projections."""
        nn.Module.__init__(self)
        for name, value in vars(plain).items():
            if name not in vars(self):
                setattr(self, name, value)
        self._parameters.update(plain._parameters)
        for name, module in plain.named_children():
            if not isinstance(module, nn.Linear):
                self.add_module(name, module)
        for name, module in linears.items():
            self.add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            held = ", ".join(name for name, module in self._modules.items() if isinstance(module, PackedLinear))
            raise AttributeError(f"a fast model has {name} within {held}; Llama.from_pretrained gives the plain model")
        return super().__getattr__(name)

    @property
    def linears(self) -> list[PackedLinear]:
        return [module for module in self.children() if isinstance(module, PackedLinear)]

    @property
    def norms(self) -> list[nn.Module]:
        return [self.get_submodule(slot) for slot in self.norm_slots]

    @property
    def supported(self) -> bool:
        """Whether the operator can compute this branch, apart from the settings of its norms."""
        others = [self.get_submodule(slot) for slot in _UNSUPPORTED if slot in self._modules]
        kernels = all(linear.kernels for linear in self.linears)
        learned = bool(self._parameters)  # scales of the residual sum
        return kernels and not learned and all(isinstance(norm, nn.Identity) for norm in others)

    @property
    def scales(self) -> list[float]:
        """Those that the operator takes: first of the residual sum, α and β."""
        return [scale if isinstance(scale, (int, float)) else 1.0 for scale in (self.alpha, self.beta)]


class FusedAttention(FusedBranch, Attention):
    """Attention whose q, k and v are one matrix. `window`: positions that this layer sees; 0 for all."""

    norm_slots = ("pre_norm", "q_norm", "k_norm", "out_norm", "post_norm")
    qkv_proj: PackedLinear
    o_proj: PackedLinear  # type: ignore[assignment]

    def __init__(self, plain: Attention, make: MakeLinear, window: int) -> None:
        qkv_proj = make([plain.q_proj, plain.k_proj, plain.v_proj])
        self.adopt(plain, {"qkv_proj": qkv_proj, "o_proj": make([plain.o_proj])})
        self.window = window

    @property
    def supported(self) -> bool:
        return super().supported and not self.norm_after_rope

    @property
    def scales(self) -> list[float]:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return [*super().scales, scale, self.softcap or 0.0]

    def branch(self, x: Tensor, rope: Rope | None, mask: Tensor, kv: LayerCache | None) -> Tensor:  # type: ignore[override]
        if kv is None or x.shape[1] > 1 or not self.qkv_proj.kernels or needs_grad(x):
            return super().branch(x, rope, mask, kv)
        qkv = torch.cat(self.qkv(x, rope), 2)  # tokens of any rows; PyTorch's attention takes ten times as long
        cache, scales = (kv.k, kv.v, kv.pages, kv.positions), self.scales[2:]
        return self.o_proj(self.mid_norm(torch.ops.llama_mini.attend(qkv, *cache, self.window, *scales)))

    def project(self, x: Tensor) -> Sequence[Tensor]:
        return self.qkv_proj.split(self.qkv_proj(x))

    @property
    def apart(self) -> int:
        """Which of q, k and v begin another matrix, for the operator: 1 for k, and 2 more for v."""
        begins = {sum(len(each.parts) for each in self.qkv_proj.matrices[:i]) for i in (1, 2)}
        return (1 in begins) + 2 * (2 in begins)


class FusedFeedForward(FusedBranch, FeedForward):
    """SwiGLU whose gate and up are one matrix."""

    norm_slots = ("pre_norm", "out_norm", "post_norm")
    gate_up_proj: PackedLinear
    down_proj: PackedLinear  # type: ignore[assignment]

    def __init__(self, plain: FeedForward, make: MakeLinear) -> None:
        gate = [] if plain.gate_proj is None else [plain.gate_proj]
        self.adopt(plain, {"gate_up_proj": make([*gate, plain.up_proj]), "down_proj": make([plain.down_proj])})

    def hidden(self, x: Tensor) -> Tensor:
        *gate, up = self.gate_up_proj.split(self.gate_up_proj(x))
        act, up = ACTIVATIONS[self.activation], self.up_norm(up)
        return act(self.gate_norm(gate[0])) * up if gate else act(up)

    @property
    def supported(self) -> bool:
        return super().supported and self.activation in OPERATOR_ACTIVATIONS and len(self.gate_up_proj.parts) == 2
