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
from llama_mini.lab.massive_activations import MASSIVE, MassiveElement
from llama_mini.lab.paths import select
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama
from llama_mini.validate import check_choice


class Peak(NamedTuple):
    """A large element. In a q, k or v norm that sees each head, dim counts through all heads."""

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
    first, median: of rms, that of the first token (the median over the texts), and the median of the other tokens.
    mean_energy: the mean's share of the energy, (mean x)² / mean x², averaged over all positions.
    max_over_median: the largest |x| over the (lower) median of all |x|. peak: that element, and its position.
    massive: the elements of at least 100 times that median.
    Padding is in x, y and rms, and in no other statistic.
    """

    x: Tensor | None
    y: Tensor | None
    rms: Tensor
    first: float
    median: float
    mean_energy: float
    max_over_median: float
    peak: Peak
    massive: list[Peak]


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

    def massive(self) -> Table[MassiveElement]:
        """The massive elements of each layer's output: where they are born, erased, and born again."""
        return Table(
            [
                MassiveElement(layer, *one, record.max_over_median * abs(one.value / record.peak.value))
                for layer, record in enumerate(self.resid.resid_post)
                for one in record.massive
            ]
        )


def capture(
    model: Llama, ids: Ids, at: str | Sequence[str] | None = None, keep: Literal["tensors", "stats"] = "tensors"
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


def _record(x: Tensor, y: Tensor | None, real: Tensor, keep: bool) -> Record:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    energy = wide.pow(2).mean(-1)
    in_mean = torch.where(energy > 0, wide.mean(-1).pow(2) / energy, energy)[real]  # zeros give 0; NaN stays
    rows, tokens = real.nonzero(as_tuple=True)
    of_texts, rms = wide[rows, tokens].flatten(1), energy.sqrt().float()
    size = of_texts.abs()
    median = size.median()

    def element(index: Sequence[int]) -> Peak:
        place, dim = index
        return Peak(int(rows[place]), int(tokens[place]), dim, float(of_texts[place, dim]))

    first, middle = first_and_median(rms, real)
    largest = np.unravel_index(int(size.argmax()), size.shape)
    return Record(
        x=x if keep else None,
        y=y if keep else None,
        rms=rms,
        first=first,
        median=middle,
        mean_energy=float(in_mean.double().mean()),
        max_over_median=float(size.max() / median),
        peak=element([int(i) for i in largest]),
        massive=[element(at) for at in ((size >= MASSIVE * median) & (median > 0)).nonzero().tolist()],
    )


def besides_first(values: Tensor, real: Tensor) -> Tensor:
    """The values (B, T, ...) of all tokens but each text's first, which is often massive: (N,), float64.

    real: (B, T), which tokens are not padding. A batch of texts of one token keeps them.
    """
    others = real.clone()
    others[:, 0] = not others[:, 1:].any()
    return values[others].flatten().double()


def first_and_median(values: Tensor, real: Tensor) -> tuple[float, float]:
    """The median over the texts' first tokens, and that over the other tokens, of values (B, T, ...)."""
    first = values[:, 0].flatten().double()
    return float(first.quantile(0.5)), float(besides_first(values, real).quantile(0.5))
