"""Input and output of the lab's commands: checkpoint, text and settings of an edit; tables and pictures."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llama_mini.checkpoint.io.atomic import new_directory
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.errors import CheckpointPathError, RequestError
from llama_mini.lab.cost import Score
from llama_mini.lab.keep import keep_words, number_or_text
from llama_mini.lab.recording import Record, Recording
from llama_mini.lab.reporting.style import save
from llama_mini.lab.table import Table
from llama_mini.lab.training import sample_text
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.tokenizer import open_tokenizer
from llama_mini.validate import as_dict, check_whole, short_repr

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def checkpoint(args: argparse.Namespace, name: str | None = None) -> Path:
    """The checkpoint of this name, or else that of --model."""
    return resolve(args.checkpoint(name))


def read_model(args: argparse.Namespace, name: str | None = None) -> tuple[Llama, Tokenizer]:
    source = open_checkpoint(checkpoint(args, name))
    return load_model(Llama, source, args.dtype, "cpu"), open_tokenizer(source)


def read_ids(tokenizer: Tokenizer, args: argparse.Namespace) -> list[list[int]]:
    """--rows rows of --tokens tokens of each text, the last one perhaps shorter; --bos puts BOS before each.

    Raises RequestError if a row has fewer than two tokens, or if the tokenizer has no BOS.
    """
    for name, least in (("offset", 0), ("tokens", 2), ("rows", 1)):
        check_whole(f"--{name}", getattr(args, name), RequestError, least)
    bos = [tokenizer.bos_id] if args.bos and tokenizer.bos_id is not None else []
    if args.bos and not bos:
        raise RequestError("the tokenizer has no BOS token: leave --bos out")
    rows = []
    for path in args.text or [None]:
        text = sample_text() if path is None else read_text(path)
        ids = tokenizer.encode(text, add_special_tokens=not args.bos)
        for row in range(args.rows):
            start = args.offset + row * args.tokens
            part = ids[start : start + args.tokens]
            if len(part) < 2:
                raise RequestError(
                    f"{path or 'the default text'} has {len(ids)} tokens, so row {row}, from token {start} on, has "
                    f"{len(part)}; at least 2 are needed"
                )
            rows.append([*bos, *part])
    return rows


def save_model(args: argparse.Namespace, model: Llama) -> None:
    """Writes a model and the tokenizer of the command's checkpoint to --save, if that is given."""
    if args.save is not None:
        with new_directory(args.save) as folder:  # so that it has all or nothing
            model.save_pretrained(folder)
            args.save_tokenizer(open_checkpoint(checkpoint(args)), folder)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointPathError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None


def calibration(tokenizer: Tokenizer, args: argparse.Namespace) -> list[list[int]] | None:
    """The same rows of the files of --calibrate; None without."""
    if args.calibrate is None:
        return None
    return read_ids(tokenizer, argparse.Namespace(**vars(args) | {"text": args.calibrate}))


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """The settings of an edit, from KEY=VALUE words. A value is JSON, a name, or a short form: see SETTINGS_HELP."""
    settings: list[tuple[str, Any]] = []
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not key or not value:
            raise RequestError(f"an edit is written KEY=VALUE, such as eps=1e-3, not {short_repr(pair)}")
        settings.append((key, _value(key, value)))
    return as_dict("the edit", settings, RequestError)


def _value(key: str, text: str) -> Any:
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError as error:
            raise RequestError(f"{key}: {short_repr(text)} is no JSON: {error}") from None
    if key == "keep":
        return keep_words(text)
    name, _, rest = text.partition(":")
    if name == "scale" and rest:
        return ("scale", number_or_text(rest))
    if name == "dims" and rest:
        return {"dims": [number_or_text(dim) for dim in rest.split(",")]}
    return {"true": True, "false": False}.get(text.lower(), number_or_text(text))


def show(
    args: argparse.Namespace, table: Table[Any], picture: "Callable[[], Figure] | None" = None, empty: str = "nothing"
) -> None:
    """Prints the table as --json and --csv ask, and draws the picture if --picture asks for it."""
    if args.json:
        print(table.to_json())
    elif args.csv:
        print(table.to_csv(), end="")
    else:
        print(table if len(table) else empty)
    if picture is not None:
        draw(args, picture)


def draw(args: argparse.Namespace, picture: "Callable[[], Figure]") -> None:
    if args.picture is not None:
        save(picture(), args.picture)


def captured(recording: Recording) -> Table[Any]:
    """The norms in the order of the forward pass, then the residual stream by point and layer; columns as in Record.

    `rms` is the root mean square over all tokens; `first` and `median` tell them apart.
    """
    records = dict(recording)
    for point in ("resid_pre", "resid_mid", "resid_post"):
        records |= {f"layers.{i}.{point}": record for i, record in enumerate(getattr(recording.resid, point))}
    several = len(recording.texts.real) > 1
    return Table([_captured(path, record, recording.texts.real, several) for path, record in records.items()])


def _captured(path: str, record: Record, real: Tensor, several: bool) -> SimpleNamespace:
    return SimpleNamespace(
        path=path,
        rms=float(record.rms[real].double().square().mean().sqrt()),
        first=record.first,
        median=record.median,
        mean_energy=record.mean_energy,
        max_over_median=record.max_over_median,
        peak_row=record.peak.row if several else None,
        peak_token=record.peak.token,
        peak_dim=record.peak.dim,
        peak=record.peak.value,
    )


def scores(by_model: dict[str, Score]) -> Table[Any]:
    """A row for each model; columns as in Score."""
    columns = ("loss", "perplexity", "dloss", "se", "kl", "top1")
    return Table([SimpleNamespace(model=m, **{c: getattr(s, c) for c in columns}) for m, s in by_model.items()])
