"""What each command of the lab does: it calls the lab's own functions and prints one table."""

import argparse
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from llama_mini import lab
from llama_mini.checkpoint.load import load_model, open_tokenizer
from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.errors import CheckpointPathError, RequestError
from llama_mini.lab.cost import Score
from llama_mini.lab.recording import massive_activation
from llama_mini.lab.table import Table
from llama_mini.lab.tour import tour
from llama_mini.model import Llama
from llama_mini.tokenizer import Tokenizer

WIDTHS = {"en": 100, "ko": 55}  # a Korean letter is two columns wide
TOUR_TEXT = "The quick brown fox jumps over the lazy dog."


def run(args: argparse.Namespace) -> None:
    """Runs the command that `args` name. Raises LlamaMiniError."""
    COMMANDS[args.command](args)


# --- a checkpoint ---


def _norms(args: argparse.Namespace) -> None:
    _print(lab.norms(_model(args)[0]), args)


def _doctor(args: argparse.Namespace) -> None:
    path = _checkpoint(args)
    found = lab.doctor(path, _ids(_tokenizer(path), args))
    _print(found, args, empty="nothing found")


def _capture(args: argparse.Namespace) -> None:
    model, tokenizer = _model(args)
    ids = _ids(tokenizer, args)
    seen = lab.capture(model, ids, at=args.at, keep="stats")
    rows = [(path, record) for path, record in seen.items()]
    for point in ("resid_pre", "resid_mid", "resid_post"):
        rows += [(f"layers.{i}.{point}", record) for i, record in enumerate(getattr(seen.resid, point))]
    table = Table(
        [
            CapturedRow(
                path, float(r.rms.mean()), r.mean_energy, r.max_over_median, r.peak.token, r.peak.dim, r.peak.value
            )
            for path, r in rows
        ]
    )
    _print(table, args)
    if not (args.json or args.csv) and (found := massive_activation(seen)) is not None:
        print(
            f"massive activation: dimension {found.dim}, token {found.token} {tokenizer.decode([ids[found.token]])!r}, "
            f"born in layer {found.layer}, {found.times_median:,.0f} times the median"
        )


def _ablate(args: argparse.Namespace) -> None:
    model, tokenizer = _model(args)
    settings = _settings(args.settings) or {"freeze": "mean"}
    if "freeze" in settings:
        settings.setdefault("keep_first", not args.drop_first)
    _print(lab.ablate(model, _ids(tokenizer, args), args.pattern, **settings), args)


def _edit(args: argparse.Namespace) -> None:
    model, tokenizer = _model(args)
    ids, settings = _ids(tokenizer, args), _settings(args.settings) or {"eps": 1e-3}
    base = lab.score(model, ids)
    with lab.edit(model, {args.pattern: settings}, ids):
        changed = lab.score(model, ids, against=base)
    _print_scores({"as it is": base, f"{args.pattern} {settings}": changed}, args)


def _skip(args: argparse.Namespace) -> None:
    model, tokenizer = _model(args)
    _print(lab.skip_layers(model, _ids(tokenizer, args)), args)


def _move(args: argparse.Namespace) -> None:
    model, tokenizer = _model(args)
    _compare(model, lab.move(model, args.pattern, to=args.to), f"moved to {args.to}", tokenizer, args)


def _fold(args: argparse.Namespace) -> None:
    model, tokenizer = _model(args)
    _compare(model, lab.fold(model, args.pattern), "folded", tokenizer, args)


def _compare(model: Llama, other: Llama, what: str, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    ids = _ids(tokenizer, args)
    base = lab.score(model, ids)
    _print_scores({"as it is": base, what: lab.score(other, ids, against=base)}, args)
    if args.save is not None:
        other.save_pretrained(args.save)


def _report(args: argparse.Namespace) -> None:
    if args.json or args.csv:
        raise RequestError("a report is a page, not a table: leave --json and --csv out")
    path = _checkpoint(args)
    model, tokenizer = _model(args)
    print(lab.report(args.target, model, _ids(tokenizer, args), tokenizer=tokenizer, name=path.name))


def _tour(args: argparse.Namespace) -> None:
    model, tokenizer = _model(args)
    steps = tour(model, tokenizer.encode(TOUR_TEXT), args.lang)
    if args.json:
        print(json.dumps([vars(step) for step in steps], indent=2, ensure_ascii=False))
        return
    if args.csv:
        raise RequestError("a tour is a text, not a table: leave --csv out")
    for step in steps:
        numbers = "\n".join(f"    {line}" for line in step.numbers)
        text = textwrap.fill(step.text, WIDTHS[args.lang])
        print(f"{step.title}\n\n{text}\n\n{numbers}\n", flush=True)


# --- a plan ---


def _predict(args: argparse.Namespace) -> None:
    _print(lab.predict(args.plan, args.depth).table(), args)


def _init(args: argparse.Namespace) -> None:
    _print(lab.init(args.plan, args.depth, dim=args.dim, seeds=args.seeds).table(), args)


def _sweep(args: argparse.Namespace) -> None:
    _print(lab.sweep(args.plans, args.depths).table(), args)


def _race(args: argparse.Namespace) -> None:
    _print(lab.race(args.plans, steps=args.steps).table(), args)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "norms": _norms,
    "doctor": _doctor,
    "capture": _capture,
    "ablate": _ablate,
    "edit": _edit,
    "skip": _skip,
    "move": _move,
    "fold": _fold,
    "predict": _predict,
    "init": _init,
    "sweep": _sweep,
    "race": _race,
    "report": _report,
    "tour": _tour,
}


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


def _print_scores(scores: dict[str, Score], args: argparse.Namespace) -> None:
    rows = [ScoreRow(name, s.loss, s.perplexity, s.dloss, s.kl, s.top1) for name, s in scores.items()]
    _print(Table(rows), args)


def _print(table: Table[Any], args: argparse.Namespace, empty: str = "nothing") -> None:
    if args.json:
        print(table.to_json())
    elif args.csv:
        print(table.to_csv(), end="")
    else:
        print(table if len(table) else empty)


def _checkpoint(args: argparse.Namespace) -> Path:
    if args.model is not None:
        return resolve(args.model)
    from llama_mini.checkpoint.default import ensure_default_checkpoint

    return ensure_default_checkpoint()


def _model(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    source = open_checkpoint(_checkpoint(args))
    return load_model(Llama, source, args.dtype, "cpu"), open_tokenizer(source)


def _tokenizer(path: Path) -> Tokenizer:
    return open_tokenizer(open_checkpoint(path))


def _ids(tokenizer: Tokenizer, args: argparse.Namespace) -> list[int]:
    """The first tokens of the text. Raises RequestError where there are too few."""
    if args.tokens < 2:
        raise RequestError(f"--tokens must be at least 2, not {args.tokens}")
    if args.text is None:
        text = files("llama_mini.lab").joinpath("text.txt").read_text(encoding="utf-8")
    else:
        try:
            text = args.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointPathError(f"cannot read {args.text}: {getattr(error, 'strerror', error)}") from None
    ids = tokenizer.encode(text)[: args.tokens]
    if len(ids) < 2:
        raise RequestError(f"{args.text} has {len(ids)} tokens; at least 2 are needed")
    return ids


def _settings(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE words as the settings of an edit: numbers, true and false; gain=scale:2 multiplies."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise RequestError(f"an edit is written KEY=VALUE, such as eps=1e-3, not {pair!r:.80}")
        if key in settings:
            raise RequestError(f"{key!r:.80} is given twice")
        settings[key] = _value(value)
    return settings


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("scale:"):
        return ("scale", _value(text.removeprefix("scale:")))
    try:
        return float(text)
    except ValueError:
        return text
