"""Every norm of a model in one table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_mini.checkpoint.plain import check_plain
from llama_mini.errors import RequestError
from llama_mini.lab.paths import readers, slots
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
    wide = _wide(norm.weight)
    return 1 + wide if norm.gain == "1+w" else wide


@dataclass(frozen=True)
class FoldedRow:
    """The smallest, median and largest of one norm's folded gains; min_dim and max_dim are their dimensions."""

    path: str
    min: float
    min_dim: int
    median: float
    max: float
    max_dim: int


class FoldedGains(dict[str, Tensor]):
    """By the norm's path, (dim,): |gain| times the length of the matching columns of all matrices that read the norm.

    A gain alone means little: the matrices can undo it. This product survives folding, and says how much of each
    dimension the branch reads.
    """

    def table(self) -> Table[FoldedRow]:
        return Table([_folded_row(path, values) for path, values in self.items()])


def folded_gains(model: Llama) -> FoldedGains:
    """The folded gains of the norms that only matrices read: pre, mid and final norms, float32.

    Raises RequestError for a model that is edited or optimized, and for one without such norms.
    """
    check_plain(model)
    gains = FoldedGains()
    for path, norm in slots(model).items():
        if isinstance(norm, Norm) and (names := readers(path, model.config)):
            squares = [_wide(model.get_parameter(name)).square().sum(0) for name in names]
            gain, lengths = effective_gain(norm), torch.stack(squares).sum(0).sqrt() * abs(norm.scale)
            gains[path] = (lengths if gain is None else lengths * gain.abs()).float()
    if not gains:
        raise RequestError("no norm of the model is read by matrices alone: pre, mid and final norms are")
    return gains


def _folded_row(path: str, gains: Tensor) -> FoldedRow:
    low, high = int(gains.argmin()), int(gains.argmax())
    return FoldedRow(path, float(gains[low]), low, float(gains.quantile(0.5)), float(gains[high]), high)


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


def _row(path: str, norm: Norm) -> NormRow:
    gain = effective_gain(norm)
    span: tuple[float | None, ...] = (None, None, None)
    if gain is not None and not gain.is_meta:
        span = float(gain.min()), float(gain.double().mean()), float(gain.max())
    slot = path.rpartition(".")[2]
    return NormRow(path, slot, norm.kind, norm.eps, norm.gain, norm.cast, norm.scale, norm.bias is not None, *span)
