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
from llama_mini.model.llama import Llama
from llama_mini.validate import check_choice, check_token_ids

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
    """The records of one text by the norm's path, in the order of the forward pass; `.resid` is the residual stream."""

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
    """Runs the model once on token ids, (T,), (B, T) or a list, and records the norms and the residual stream.

    at: one pattern or several of the norms to record; None: all. The stream's statistics are always kept. Its tensors
        are kept only if `at` is None, so that `at` limits the memory.
    keep: "stats" drops each tensor as soon as its statistics are computed.

    Raises RequestError for a pattern that matches no norm, and for ids that the model cannot read.
    """
    check_choice("keep", keep, ("tensors", "stats"), RequestError)
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

    norms, residuals = ({path: model.get_submodule(path) for path in group} for group in (paths, branches))
    with torch.no_grad(), watched(norms, see_norm), watched(residuals, see_branch):
        model(tokens)
    pre, mid, post = stream[:-1:2], stream[1::2], stream[2::2]
    return Recording({path: records[path] for path in paths}, ResidualStream(tuple(pre), tuple(mid), tuple(post)))


def as_tokens(model: Llama, ids: Tensor | Sequence[int], at_least: int = 2) -> Tensor:
    """Token ids as (B, T) int64 on the model's device; raises RequestError if T < `at_least` or an id is unknown."""
    if model.device.type == "meta":
        raise RequestError("the model is on the meta device, where it has no weights: load it on cpu or cuda")
    try:
        tokens = torch.as_tensor(ids, device=model.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"token ids must be a tensor or list of whole numbers: {error}") from None
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise RequestError(f"token ids must be whole numbers, not {tokens.dtype}")
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < at_least:
        raise RequestError(f"token ids must be (T,) or (B, T), T at least {at_least}, not {tuple(tokens.shape)}")
    check_token_ids((int(tokens.min()), int(tokens.max())), model.config.vocab_size, RequestError)
    return tokens.to(torch.int64)


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


def _record(x: Tensor, y: Tensor | None, keep: bool) -> Record:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    energy, size = wide.pow(2).mean(-1), wide.abs()
    in_mean = torch.where(energy > 0, wide.mean(-1).pow(2) / energy, energy)  # zeros give 0; NaN stays
    largest = int(size.argmax())
    row, token, dim = (int(i) for i in np.unravel_index(largest, x.flatten(2).shape))
    return Record(
        x=x if keep else None,
        y=y if keep else None,
        rms=energy.sqrt().float(),
        mean_energy=float(in_mean.double().mean()),
        max_over_median=float(size.max() / size.median()),
        peak=Peak(row, token, dim, float(wide.flatten()[largest])),
    )
