"""Input and output of the lab's commands: checkpoint, text and settings of an edit; tables and pictures."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.errors import CheckpointPathError, RequestError
from llama_mini.lab.cost import Score
from llama_mini.lab.recording import Recording
from llama_mini.lab.reporting.style import save
from llama_mini.lab.table import Table
from llama_mini.lab.training import sample_text
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.tokenizer import open_tokenizer
from llama_mini.validate import as_dict, check_whole, short_repr

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def checkpoint(args: argparse.Namespace) -> Path:
    return resolve(args.checkpoint())


def read_model(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    source = open_checkpoint(checkpoint(args))
    return load_model(Llama, source, args.dtype, "cpu"), open_tokenizer(source)


def read_ids(tokenizer: Tokenizer, args: argparse.Namespace) -> list[int]:
    """The first --tokens tokens of the text. Raises RequestError if there are fewer than two."""
    check_whole("--tokens", args.tokens, RequestError, 2)
    try:
        text = sample_text() if args.text is None else args.text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointPathError(f"cannot read {args.text}: {getattr(error, 'strerror', error)}") from None
    ids = tokenizer.encode(text)[: args.tokens]
    if len(ids) < 2:
        raise RequestError(f"{args.text} has {len(ids)} tokens; at least 2 are needed")
    return ids


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """The settings of an edit, from KEY=VALUE words: numbers, true, false or names; gain=scale:2 multiplies by 2."""
    settings: list[tuple[str, Any]] = []
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not key or not value:
            raise RequestError(f"an edit is written KEY=VALUE, such as eps=1e-3, not {short_repr(pair)}")
        settings.append((key, _value(value)))
    return as_dict("the edit", settings, RequestError)


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith("scale:"):
        return ("scale", _value(text.removeprefix("scale:")))
    try:
        return float(text)
    except ValueError:
        return text


def show(
    args: argparse.Namespace,
    table: Table[Any],
    picture: "Callable[[], Figure] | None" = None,
    empty: str = "nothing",
) -> None:
    """Prints the table as --json and --csv ask, and draws the picture if --picture asks for it."""
    if args.json:
        print(table.to_json())
    elif args.csv:
        print(table.to_csv(), end="")
    else:
        print(table if len(table) else empty)
    if picture is not None and args.picture is not None:
        save(picture(), args.picture)


def captured(recording: Recording) -> Table[Any]:
    """The norms in the order of the forward pass, then the residual stream by point and layer; columns as in Record."""
    records = dict(recording)
    for point in ("resid_pre", "resid_mid", "resid_post"):
        records |= {f"layers.{i}.{point}": record for i, record in enumerate(getattr(recording.resid, point))}
    columns = ("rms", "mean_energy", "max_over_median", "peak_token", "peak_dim", "peak")
    rows = {path: (float(r.rms.mean()), r.mean_energy, r.max_over_median, *r.peak[1:]) for path, r in records.items()}
    return Table([SimpleNamespace(path=p, **dict(zip(columns, row, strict=True))) for p, row in rows.items()])


def scores(by_model: dict[str, Score]) -> Table[Any]:
    """A row for each model; columns as in Score."""
    columns = ("loss", "perplexity", "dloss", "kl", "top1")
    return Table([SimpleNamespace(model=m, **{c: getattr(s, c) for c in columns}) for m, s in by_model.items()])
