"""What the lab's commands give: one table on standard output, and a picture in a file where --picture asks for it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_mini.lab.cost import Score
from llama_mini.lab.recording import Recording
from llama_mini.lab.reporting.style import save
from llama_mini.lab.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(table: Table[Any], args: argparse.Namespace, empty: str = "nothing") -> None:
    if args.json:
        print(table.to_json())
    elif args.csv:
        print(table.to_csv(), end="")
    else:
        print(table if len(table) else empty)


def draw(args: argparse.Namespace, picture: "Callable[[], Figure]") -> None:
    if args.picture is not None:
        save(picture(), args.picture)


@dataclass(frozen=True)
class CapturedRow:
    """A norm's input, or a point of the residual stream: see Record."""

    path: str
    rms: float
    mean_energy: float
    max_over_median: float
    peak_token: int
    peak_dim: int
    peak: float


@dataclass(frozen=True)
class ScoreRow:
    """See Score."""

    model: str
    loss: float
    perplexity: float
    dloss: float | None
    kl: float | None
    top1: float | None


def captured(seen: Recording) -> Table[CapturedRow]:
    """The norms in the order of the forward pass, then the residual stream by point and layer."""
    rows = list(seen.items())
    for point in ("resid_pre", "resid_mid", "resid_post"):
        rows += [(f"layers.{i}.{point}", record) for i, record in enumerate(getattr(seen.resid, point))]
    return Table(
        [
            CapturedRow(
                path, float(r.rms.mean()), r.mean_energy, r.max_over_median, r.peak.token, r.peak.dim, r.peak.value
            )
            for path, r in rows
        ]
    )


def scores(of: dict[str, Score]) -> Table[ScoreRow]:
    return Table([ScoreRow(name, s.loss, s.perplexity, s.dloss, s.kl, s.top1) for name, s in of.items()])
