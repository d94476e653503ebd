"""What every norm sees and gives on a text, and the residual stream around it. Hooks, gone when the pass is over."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.lab.cost import as_tokens
from llama_mini.lab.paths import select
from llama_mini.model.llama import Llama
from llama_mini.validate import short_repr

MASSIVE = 100  # times the median; Sun et al. find hundreds to thousands
_JUMP = 10  # by which the ratio grows in the layer that makes one


class Peak(NamedTuple):
    """The element of the largest magnitude. In q, k and v norms that see each head, dim counts through the heads."""

    row: int
    token: int
    dim: int
    value: float


@dataclass(frozen=True, eq=False)
class Record:
    """
    x, y: what a norm saw and gave, as it was: (B, T, C), in q, k and v norms also (B, T, H, D). A point of the residual
        stream has no y. None where only statistics are kept.
    rms: √(mean x²) of each row, x.shape[:-1], float32.
    mean_energy: the share of a row's energy in its mean component, (mean x)² / mean x², on average over rows.
    max_over_median: the largest |x| over the (lower) median of all |x|. peak: where the largest is.
    """

    x: Tensor | None
    y: Tensor | None
    rms: Tensor
    mean_energy: float
    max_over_median: float
    peak: Peak


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """By layer: what comes in, what stands between attention and feed-forward, what goes out.

    resid_pre[l + 1] is resid_post[l].
    """

    resid_pre: tuple[Record, ...]
    resid_mid: tuple[Record, ...]
    resid_post: tuple[Record, ...]


class Recording(Mapping[str, Record]):
    """One text's records by the norm's path, in the order of the forward pass; `.resid` is the residual stream."""

    def __init__(self, records: dict[str, Record], resid: ResidualStream) -> None:
        self._records, self.resid = records, resid

    def __getitem__(self, path: str) -> Record:
        return self._records[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def capture(
    model: Llama,
    ids: Tensor | Sequence[int],
    at: str | Sequence[str] | None = None,
    keep: Literal["tensors", "stats"] = "tensors",
) -> Recording:
    """Runs token ids, (T,), (B, T) or a list, once, and records norms and residual stream.

    at: a pattern or several: the norms to record; None: all of them. The stream's statistics are always kept, its
        tensors only together with those of all norms, so that `at` bounds the memory.
    keep: `stats` drops every tensor as soon as its statistics are known.

    Raises RequestError for a pattern that matches no norm, and for ids that the model cannot read.
    """
    if keep not in ("tensors", "stats"):
        raise RequestError(f"keep must be 'tensors' or 'stats', not {short_repr(keep)}")
    tokens = as_tokens(model, ids, at_least=1)
    paths = select(model, at)
    branches = [f"layers.{i}.{name}" for i in range(len(model.layers)) for name in ("attention", "feed_forward")]
    whole_stream = keep == "tensors" and at is None
    records: dict[str, Record] = {}
    stream: list[Record] = []

    def see_norm(path: str, x: Tensor, y: Tensor) -> None:
        records[path] = _record(x, y, keep == "tensors")

    def see_branch(path: str, x: Tensor, y: Tensor) -> None:
        points = (y,) if stream else (x, y)
        stream.extend(_record(point, None, whole_stream) for point in points)

    norms, residuals = ({path: model.get_submodule(path) for path in found} for found in (paths, branches))
    with torch.no_grad(), watched(norms, see_norm), watched(residuals, see_branch):
        model(tokens)
    pre, mid, post = stream[:-1:2], stream[1::2], stream[2::2]
    return Recording({path: records[path] for path in paths}, ResidualStream(tuple(pre), tuple(mid), tuple(post)))


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls see(name, first input, output) each time one of the modules has run, until the block ends."""
    hooks = []
    try:
        for name, module in modules.items():
            hooks.append(module.register_forward_hook(partial(_tell, see, name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class MassiveActivation(NamedTuple):
    """One element of a layer's output that dwarfs the rest.

    layer: where it is born. row, token, dim: where it stands. value: its own. times_median: its magnitude over the
    median of that output. growth: how many times that ratio exceeds the one of the layer's input.
    """

    layer: int
    row: int
    token: int
    dim: int
    value: float
    times_median: float
    growth: float


def massive_activation(recording: Recording) -> MassiveActivation | None:
    """The most massive activation at its birth: in the layer whose output's max/median grew most over its input's.

    None where no layer takes that ratio to 100 or more by a jump of 10 or more. Needs statistics alone.
    Source: Sun et al. 2024, "Massive Activations in Large Language Models".
    """
    born: MassiveActivation | None = None
    resid = recording.resid
    for layer, (before, after) in enumerate(zip(resid.resid_pre, resid.resid_post, strict=True)):
        ratio, growth = after.max_over_median, after.max_over_median / before.max_over_median
        if ratio >= MASSIVE and growth >= max(_JUMP, born.growth if born else 0):
            born = MassiveActivation(layer, *after.peak, ratio, growth)
    return born


def _tell(see: Callable[[str, Tensor, Tensor], None], name: str, _: nn.Module, args: Any, output: Tensor) -> None:
    see(name, args[0], output)


def _record(x: Tensor, y: Tensor | None, keep: bool) -> Record:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    energy, size = wide.pow(2).mean(-1), wide.abs()
    in_mean = torch.where(energy > 0, wide.mean(-1).pow(2) / energy, energy)  # a row of zeros has none; NaN stays
    largest = int(size.argmax())
    row, token, dim = (int(i) for i in torch.unravel_index(torch.tensor(largest), x.flatten(2).shape))
    return Record(
        x=x if keep else None,
        y=y if keep else None,
        rms=energy.sqrt().float(),
        mean_energy=float(in_mean.double().mean()),
        max_over_median=float(size.max() / size.median()),
        peak=Peak(row, token, dim, float(wide.flatten()[largest])),
    )
