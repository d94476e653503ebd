"""What each norm reads and returns on a text, and the residual stream, recorded by hooks during one forward pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.lab.paths import select
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama
from llama_mini.validate import check_choice

MASSIVE = 100  # times the median; Sun et al. find hundreds to thousands
_JUMP = 10  # the layer where a massive activation is born raises the ratio by at least this factor


class Peak(NamedTuple):
    """The element of largest magnitude. In a q, k or v norm that sees each head, dim counts through all heads."""

    row: int
    token: int
    dim: int
    value: float


@dataclass(frozen=True, eq=False)
class Record:
    """The values of one norm, or of one point of the residual stream, on a text.

    x, y: a norm's input and output, (B, T, C), in q, k and v norms also (B, T, H, D). A point of the residual stream
        has no y. Both are None where only statistics are kept.
    rms: √(mean x²) over the last dimension, x.shape[:-1], float32.
    mean_energy: the mean's share of the energy, (mean x)² / mean x², averaged over all positions.
    max_over_median: the largest |x| over the (lower) median of all |x|. peak: that element, and its position.
    Padding is in x, y and rms, and in no other statistic.
    """

    x: Tensor | None
    y: Tensor | None
    rms: Tensor
    mean_energy: float
    max_over_median: float
    peak: Peak


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """For each layer: its input, the stream after attention, and its output. resid_pre[l + 1] is resid_post[l]."""

    resid_pre: tuple[Record, ...]
    resid_mid: tuple[Record, ...]
    resid_post: tuple[Record, ...]


class Recording(Mapping[str, Record]):
    """The records by the norm's path, in the order of the forward pass.

    resid: the residual stream. texts: what was read; its `real` is False where a text is padded.
    """

    def __init__(self, records: dict[str, Record], resid: ResidualStream, texts: Texts) -> None:
        self._records, self.resid, self.texts = records, resid, texts

    def __getitem__(self, path: str) -> Record:
        return self._records[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def capture(
    model: Llama,
    ids: Ids,
    at: str | Sequence[str] | None = None,
    keep: Literal["tensors", "stats"] = "tensors",
) -> Recording:
    """Runs the model once on token ids, (T,), (B, T) or a list of texts, and records the norms and the residual stream.

    at: one pattern or several of the norms to record; None: all. The stream's statistics are always kept. Its tensors
        are kept only if `at` is None, so that `at` limits the memory.
    keep: "stats" drops each tensor as soon as its statistics are computed.

    Raises RequestError for a pattern that matches no norm, and for ids that the model cannot read.
    """
    check_choice("keep", keep, ("tensors", "stats"), RequestError)
    texts = as_texts(model, ids, at_least=1)
    paths = select(model, at)
    branches = [f"layers.{i}.{name}" for i in range(len(model.layers)) for name in ("attention", "feed_forward")]
    whole_stream = keep == "tensors" and at is None
    records: dict[str, Record] = {}
    stream: list[Record] = []

    def see_norm(path: str, x: Tensor, y: Tensor) -> None:
        records[path] = _record(x, y, texts.real, keep == "tensors")

    def see_branch(path: str, x: Tensor, y: Tensor) -> None:
        points = (y,) if stream else (x, y)
        stream.extend(_record(point, None, texts.real, whole_stream) for point in points)

    norms, residuals = ({path: model.get_submodule(path) for path in group} for group in (paths, branches))
    with torch.no_grad(), watched(norms, see_norm), watched(residuals, see_branch):
        model(texts.tokens)
    resid = ResidualStream(*(tuple(points) for points in (stream[:-1:2], stream[1::2], stream[2::2])))
    return Recording({path: records[path] for path in paths}, resid, texts)


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls see(name, first input, output) whenever one of the modules has run, until the block ends."""

    def hook(name: str, _: nn.Module, args: Any, output: Tensor) -> None:
        see(name, args[0], output)

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, name)))
        yield


class MassiveActivation(NamedTuple):
    """One element of a layer's output that is far larger than the rest.

    layer: the layer where it is born. row, token, dim: its position. times_median: its magnitude over the median of
    the layer's output. growth: that ratio over the ratio of maximum to median in the layer's input.
    """

    layer: int
    row: int
    token: int
    dim: int
    value: float
    times_median: float
    growth: float


def massive_activation(recording: Recording) -> MassiveActivation | None:
    """The massive activation of the layer where max/median grows most from input to output: there it is born.

    None if no layer raises that ratio at least tenfold, to 100 or more. `keep="stats"` is enough for it.
    Source: Sun et al. 2024, "Massive Activations in Large Language Models".
    """
    born: MassiveActivation | None = None
    resid = recording.resid
    for layer, (before, after) in enumerate(zip(resid.resid_pre, resid.resid_post, strict=True)):
        ratio, growth = after.max_over_median, after.max_over_median / before.max_over_median
        if ratio >= MASSIVE and growth >= max(_JUMP, born.growth if born else 0):
            born = MassiveActivation(layer, *after.peak, ratio, growth)
    return born


def _record(x: Tensor, y: Tensor | None, real: Tensor, keep: bool) -> Record:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    energy, size = wide.pow(2).mean(-1), wide.abs()
    in_mean = torch.where(energy > 0, wide.mean(-1).pow(2) / energy, energy)[real]  # zeros give 0; NaN stays
    rows, tokens = real.nonzero(as_tuple=True)
    of_texts = size[rows, tokens].flatten(1)
    largest, dim = (int(i) for i in np.unravel_index(int(of_texts.argmax()), of_texts.shape))
    row, token = int(rows[largest]), int(tokens[largest])
    return Record(
        x=x if keep else None,
        y=y if keep else None,
        rms=energy.sqrt().float(),
        mean_energy=float(in_mean.double().mean()),
        max_over_median=float(of_texts.max() / of_texts.median()),
        peak=Peak(row, token, dim, float(wide[row, token].flatten()[dim])),
    )
