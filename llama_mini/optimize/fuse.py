"""Replaces the modules of a model by fast ones, and says where to load each tensor of the plain model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.code_formats import FORMATS
from llama_mini.checkpoint.keys import EMBEDDING
from llama_mini.checkpoint.source import StoredCodes
from llama_mini.checkpoint.weight_formats import SETTINGS, uniform_formats
from llama_mini.errors import RequestError
from llama_mini.model.llama import Llama, TransformerBlock
from llama_mini.model.norm import RMSNorm
from llama_mini.optimize.build import load_kernels
from llama_mini.optimize.fusable import FusedRMSNorm
from llama_mini.optimize.fused_branches import FusedAttention, FusedFeedForward
from llama_mini.optimize.fused_layers import FusedEmbedding, FusedHead, FusedLayers
from llama_mini.optimize.mixed_linear import MixedLinear
from llama_mini.optimize.packed_linear import FloatLinear, PackedLinear, supported
from llama_mini.optimize.quantized_linear import QuantizedLinear
from llama_mini.validate import check_choice


@dataclass
class PackedPart:
    """Where a tensor of the plain model goes: a part of a PackedLinear, or that part's bias. A WeightSink."""

    linear: PackedLinear
    part: int
    bias: bool = False

    def destination(self, first: int, n: int) -> Tensor | None:
        """The memory of n rows from row `first` on; None if they are not stored as floats."""
        return self.linear.bias_destination(self.part) if self.bias else self.linear.destination(self.part, first, n)

    def load(self, tensor: Tensor | StoredCodes, first: int = 0) -> None:
        """Stores rows from row `first` on, a multiple of `block_rows`. A bias is stored in one call."""
        if not isinstance(tensor, Tensor):
            assert isinstance(self.linear, QuantizedLinear)
            self.linear.load_codes(self.part, tensor, first)
        elif (destination := self.destination(first, len(tensor))) is None:
            self.linear.load(self.part, tensor, first)
        elif destination.data_ptr() != tensor.data_ptr():
            destination.copy_(tensor)


def optimize(model: Llama, quantize: str | None = None, kernels: str = "auto") -> Llama:
    """Makes a loaded model fast, in place, and returns it; its norms stay the same modules.

    quantize: None keeps the weights' dtype; `int8` or `int4`, beside which the head has 8. kernels: `auto` or `off`.

    Raises RequestError for an unknown setting, or if the model is optimized already.
    """
    if quantize is not None:
        check_choice("quantize", quantize, [name for name in SETTINGS if name in FORMATS], RequestError)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    formats = uniform_formats(model.config, quantize)
    for name, part in fuse(model, model.dtype, model.device, formats, kernels).items():
        part.load(tensors.pop(name))
    return model


def fuse(
    model: Llama,
    dtype: torch.dtype,
    device: torch.device,
    formats: Mapping[str, str],
    kernels: str = "auto",
    orders: Mapping[str, Tensor] = {},
) -> dict[str, PackedPart]:
    """Replaces modules by fast ones on `device`, with uninitialized weights. The model may be on the meta device.

    formats: of the matrices that are quantised, by their names in the plain model; see checkpoint/weight_formats.py.
    orders: the same way, the order of the columns of those that have another. A hook puts the input into it, and so
        the operator for whole layers leaves these layers to their modules.

    Returns where to load each tensor of the replaced modules, by its name in the plain model.
    """
    if is_fused(model):
        raise RequestError("the model is optimized already: load the plain model to optimize it with other settings")
    native = load_kernels(kernels) and supported(dtype, device)
    parts: dict[str, PackedPart] = {}
    names = {module: name for name, module in model.named_modules()}

    def make(linears: Sequence[nn.Linear | nn.Embedding]) -> PackedLinear:
        each = [packed(name, [*of_name]) for name, of_name in groupby(linears, format_of)]
        linear = each[0] if len(each) == 1 else MixedLinear(each)
        if (order := orders.get(f"{names[linears[0]]}.weight")) is not None:
            linear.register_buffer("order", order, persistent=False)
            linear.register_forward_pre_hook(_in_order)
        return linear

    def format_of(linear: nn.Linear | nn.Embedding) -> str | None:
        return formats.get(f"{names[linear]}.weight")

    def packed(name: str | None, linears: Sequence[nn.Linear | nn.Embedding]) -> PackedLinear:
        kind = FloatLinear if name is None else partial(QuantizedLinear, name)
        bias = getattr(linears[0], "bias", None) is not None
        rows, columns = [linear.weight.shape[0] for linear in linears], linears[0].weight.shape[1]
        matrix = kind(rows, columns, dtype, native, bias)
        for part, linear in enumerate(linears):
            parts[f"{names[linear]}.weight"] = PackedPart(matrix, part)
            if bias:
                parts[f"{names[linear]}.bias"] = PackedPart(matrix, part, bias=True)
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
                    norm.__class__ = FusedRMSNorm  # the same module: its hooks, address and weight stay
        if model.lm_head is not None:
            model.lm_head = FusedHead(make([model.lm_head]))  # type: ignore[assignment]
        if model.lm_head is None or EMBEDDING in formats:
            model.tok_embeddings = FusedEmbedding(make([model.tok_embeddings]))  # type: ignore[assignment]
    return parts


def _in_order(linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0][..., linear.get_buffer("order")],)


def fuser(kernels: str) -> Callable[..., dict[str, PackedPart]]:
    """`fuse` with this setting, for a model that is being loaded. Raises RequestError before anything is read."""
    load_kernels(kernels)
    return partial(fuse, kernels=kernels)


def quantized_formats(model: Llama) -> list[str]:
    """The formats of a fast model's quantised matrices: "int8", "int4"."""
    names = {module.name for module in model.modules() if isinstance(module, QuantizedLinear)}
    return sorted(names, reverse=True)


def runs_kernels(model: Llama) -> bool:
    """Whether the C++ operators multiply, whose sums do not depend on the number of tokens."""
    return any(isinstance(module, PackedLinear) and module.kernels for module in model.modules())


def is_fused(model: Llama) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())
