"""Replaces the modules of a model by fast ones, and says where each of its tensors now goes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.gguf.tensors import Blocks
from llama_mini.errors import RequestError
from llama_mini.model.llama import Llama, TransformerBlock
from llama_mini.model.norm import RMSNorm
from llama_mini.optimize.branches import FusedAttention, FusedFeedForward, normed
from llama_mini.optimize.build import load_kernels
from llama_mini.optimize.embedding import FusedEmbedding, FusedHead
from llama_mini.optimize.layers import FusedLayers
from llama_mini.optimize.matrix import CodedMatrix, FloatMatrix, Int4Matrix, Int8Matrix, Matrix, served
from llama_mini.validate import short_repr

# What the matrices of the layers become, and what the head does.
FORMATS: dict[str | None, tuple[type[Matrix], type[Matrix]]] = {
    None: (FloatMatrix, FloatMatrix),
    "int8": (Int8Matrix, Int8Matrix),
    "int4": (Int4Matrix, Int8Matrix),
}

KEPT: dict[type[Matrix], Collection[str]] = {Int8Matrix: ("Q8_0",), Int4Matrix: ("Q4_0", "Q4_1")}


@dataclass
class Slot:
    """Where a tensor of the plain model goes: a part of a matrix, or that part of its bias."""

    matrix: Matrix
    part: int
    bias: bool = False

    @property
    def accepts_quantized(self) -> Collection[str]:
        """GGUF's number formats whose codes the matrix keeps as they are."""
        return KEPT.get(type(self.matrix), ())

    def destination(self, first: int, n: int) -> Tensor | None:
        """Where n rows from `first` on lie, if they stay numbers."""
        return self.matrix.bias_room(self.part) if self.bias else self.matrix.room(self.part, first, n)

    def load(self, tensor: Tensor | Blocks, first: int = 0) -> None:
        """Takes rows of the tensor, from `first` on, a multiple of BLOCK; a bias whole."""
        if isinstance(tensor, Blocks):
            assert isinstance(self.matrix, CodedMatrix)
            self.matrix.put_blocks(self.part, tensor, first)
        elif (room := self.destination(first, len(tensor))) is None:
            self.matrix.put(self.part, tensor, first)
        elif room.data_ptr() != tensor.data_ptr():
            room.copy_(tensor)


def optimize(model: Llama, quantize: str | None = None, kernels: str = "auto") -> Llama:
    """Makes a loaded model fast, in place, and returns it; its norms stay the same modules.

    quantize: None keeps the weights' dtype; `int8` or `int4`. kernels: `auto` or `off`.

    Raises RequestError for another setting, or where the model is fast already.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, slot in fuse(model, model.dtype, model.device, quantize, kernels).items():
        slot.load(tensors.pop(name))
    return model


def fuse(
    model: Llama, dtype: torch.dtype, device: torch.device, quantize: str | None = None, kernels: str = "auto"
) -> dict[str, Slot]:
    """Replaces the modules of a model, on whatever device it is, by empty fast ones on `device`.

    Returns what takes each tensor of the plain model that they hold, by its name there.
    """
    check_format(quantize)
    if is_fused(model):
        raise RequestError("the model is fast already: load it plain to make it so in another way")
    native = load_kernels(kernels) and served(dtype, device)
    of_layers, of_head = FORMATS[quantize]
    slots: dict[str, Slot] = {}
    names = {module: name for name, module in model.named_modules()}

    def make(linears: Sequence[nn.Linear | nn.Embedding], kind: type[Matrix] = of_layers) -> Matrix:
        bias = getattr(linears[0], "bias", None) is not None
        rows, columns = [linear.weight.shape[0] for linear in linears], linears[0].weight.shape[1]
        matrix = kind(rows, columns, dtype, native, bias)
        for part, linear in enumerate(linears):
            slots[f"{names[linear]}.weight"] = Slot(matrix, part)
            if bias:
                slots[f"{names[linear]}.bias"] = Slot(matrix, part, bias=True)
        return matrix

    config = model.config
    with torch.device(device), torch.no_grad():
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, TransformerBlock)
            window = config.sliding_window if i in config.sliding_layers else None
            layer.attention = FusedAttention(layer.attention, make, window or 0)
            layer.feed_forward = FusedFeedForward(layer.feed_forward, make)
        if native:
            model.layers = FusedLayers(model.layers)
            for norm in model.modules():
                if type(norm) is RMSNorm:
                    norm.operator = normed
        if model.lm_head is None:
            model.tok_embeddings = FusedEmbedding(make([model.tok_embeddings], of_head))  # type: ignore[assignment]
        else:
            model.lm_head = FusedHead(make([model.lm_head], of_head))  # type: ignore[assignment]
    return slots


def fuser(quantize: str | None, kernels: str) -> Callable[[Llama, torch.dtype, torch.device], dict[str, Slot]]:
    """`fuse` with these settings, for a model that is being loaded. Raises RequestError before anything is read."""
    check_format(quantize)
    load_kernels(kernels)
    return lambda model, dtype, device: fuse(model, dtype, device, quantize, kernels)


def check_format(quantize: str | None) -> None:
    if quantize not in FORMATS:
        known = ", ".join(name for name in FORMATS if name)
        raise RequestError(f"quantize must be {known} or None, not {short_repr(quantize)}")


def is_fused(model: Llama) -> bool:
    return any(isinstance(module, Matrix) for module in model.modules())
