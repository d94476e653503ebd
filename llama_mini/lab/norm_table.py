"""Every norm of a model in one table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_mini.lab.paths import slots
from llama_mini.lab.table import Table
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm


@dataclass(frozen=True)
class NormRow:
    """One norm: its path, the slot (the last part of the path), its settings, and the range of its effective gain.

    min, mean and max are those of 1 + w for a `1+w` norm. They are None for a norm without a weight.
    """

    path: str
    slot: str
    kind: str
    eps: float
    gain: str
    cast: str
    scale: float
    bias: bool
    min: float | None
    mean: float | None
    max: float | None


def norms(model: Llama) -> Table[NormRow]:
    """One row for each norm, in the order of the forward pass. On the meta device the range of a gain is None."""
    return Table([_row(path, module) for path, module in slots(model).items() if isinstance(module, Norm)])


def effective_gain(norm: Norm) -> Tensor | None:
    """The factor of each element, (dim,), or (1,) for kind `scale`, in float32 or wider; None without a weight."""
    if norm.weight is None:
        return None
    wide = norm.weight.detach().to(torch.promote_types(norm.weight.dtype, torch.float32))
    return 1 + wide if norm.gain == "1+w" else wide


def _row(path: str, norm: Norm) -> NormRow:
    gain = effective_gain(norm)
    span: tuple[float | None, ...] = (None, None, None)
    if gain is not None and not gain.is_meta:
        span = float(gain.min()), float(gain.double().mean()), float(gain.max())
    slot = path.rpartition(".")[2]
    return NormRow(path, slot, norm.kind, norm.eps, norm.gain, norm.cast, norm.scale, norm.bias is not None, *span)
