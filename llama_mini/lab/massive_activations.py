"""Massive activations: single elements of the residual stream that are hundreds of times larger than the rest.

Source: Sun et al. 2024, "Massive Activations in Large Language Models".
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from llama_mini.lab.reporting.diagram import ranges
from llama_mini.lab.table import Table
from llama_mini.tokenizer import Tokenizer

MASSIVE = 100  # times the median; Sun et al. find hundreds to thousands


@dataclass(frozen=True)
class MassiveElement:
    """An element of a layer's output of at least 100 times the median.

    row, token, dim: its position. times_median: its magnitude over the median magnitude of the layer's output.
    """

    layer: int
    row: int
    token: int
    dim: int
    value: float
    times_median: float


@dataclass(frozen=True)
class Life:
    """The massive elements of one token, over all layers.

    row: of the token; None if there is one text. text: None without a tokenizer.
    layers: those whose output holds such an element; a gap means that it was erased and born again.
    dims: how many dimensions have one in any layer. dim, value, times_median: the largest; largest_in: its layer.
    """

    row: int | None
    token: int
    text: str | None
    layers: str
    dims: int
    dim: int
    value: float
    times_median: float
    largest_in: int


def lives(elements: Iterable[MassiveElement], tokens: Tensor, tokenizer: Tokenizer | None = None) -> Table[Life]:
    """The massive elements of texts (B, T) by token; the token with the largest comes first."""
    by_token: dict[tuple[int, int], list[MassiveElement]] = {}
    for element in elements:
        by_token.setdefault((element.row, element.token), []).append(element)
    rows = []
    for (row, token), own in by_token.items():
        largest = max(own, key=lambda element: element.times_median)
        text = None
        if tokenizer is not None:
            text = repr(tokenizer.decode([int(tokens[row, token])], skip_special_tokens=False))
        layers = ranges(sorted({element.layer for element in own})).partition(" ")[2]
        size = largest.dim, largest.value, largest.times_median, largest.layer
        dims = len({element.dim for element in own})
        rows.append(Life(row if len(tokens) > 1 else None, token, text, layers, dims, *size))
    return Table(sorted(rows, key=lambda life: -life.times_median))
