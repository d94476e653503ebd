"""What each command of the lab does: it calls the lab's own functions, prints one table and draws one picture."""

import argparse
import json
import shlex
import textwrap
from collections.abc import Callable

from llama_mini import lab
from llama_mini.errors import RequestError
from llama_mini.lab.command_input import checkpoint, read_ids, read_model, read_settings, read_tokenizer
from llama_mini.lab.command_output import captured, draw, scores, show
from llama_mini.lab.reporting import figures, plan_figures
from llama_mini.lab.reporting.report import Shell
from llama_mini.lab.reporting.style import check_drawable, check_picture
from llama_mini.lab.tour import tour
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer

WIDTHS = {"en": 100, "ko": 55}  # a Korean letter is two columns wide
TOUR_TEXT = "The quick brown fox jumps over the lazy dog."
RACERS = ("pre", "post")  # of the report


def run(args: argparse.Namespace) -> None:
    """Runs the command that `args` name. Raises LlamaMiniError."""
    if getattr(args, "picture", None) is not None:
        check_picture(args.picture)
    COMMANDS[args.command](args)


# --- a checkpoint ---


def _norms(args: argparse.Namespace) -> None:
    rows = lab.norms(read_model(args)[0])
    show(rows, args)
    draw(args, lambda: figures.gain_picture(rows))


def _doctor(args: argparse.Namespace) -> None:
    path = checkpoint(args)
    found = lab.doctor(path, read_ids(read_tokenizer(path), args))
    show(found, args, empty="nothing found")


def _capture(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    ids = read_ids(tokenizer, args)
    seen = lab.capture(model, ids, at=args.at, keep="stats" if args.picture is None else "tensors")
    show(captured(seen), args)
    if not (args.json or args.csv) and (found := lab.massive_activation(seen)) is not None:
        print(
            f"massive activation: dimension {found.dim}, token {found.token} {tokenizer.decode([ids[found.token]])!r}, "
            f"born in layer {found.layer}, {found.times_median:,.0f} times the median"
        )
    draw(args, lambda: figures.residual_rms_picture(seen))


def _ablate(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    settings = read_settings(args.settings) or {"freeze": "mean"}
    if "freeze" in settings:
        settings.setdefault("keep_first", not args.drop_first)
    costs = lab.ablate(model, read_ids(tokenizer, args), args.pattern.split(","), **settings)
    show(costs, args)
    draw(args, lambda: figures.norm_cost_picture(costs))


def _edit(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    ids, settings = read_ids(tokenizer, args), read_settings(args.settings) or {"eps": 1e-3}
    base = lab.score(model, ids)
    with lab.edit(model, {args.pattern: settings}, ids):
        changed = lab.score(model, ids, against=base)
    show(scores({"as it is": base, f"{args.pattern} {settings}": changed}), args)


def _skip(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    costs = lab.skip_layers(model, read_ids(tokenizer, args))
    show(costs, args)
    draw(args, lambda: figures.skip_picture(costs))


def _move(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    _compare(model, lab.move(model, args.pattern, to=args.to), f"moved to {args.to}", tokenizer, args)


def _fold(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    _compare(model, lab.fold(model, args.pattern), "folded", tokenizer, args)


def _compare(model: Llama, other: Llama, what: str, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    ids = read_ids(tokenizer, args)
    base = lab.score(model, ids)
    show(scores({"as it is": base, what: lab.score(other, ids, against=base)}), args)
    if args.save is not None:
        other.save_pretrained(args.save)


def _report(args: argparse.Namespace) -> None:
    if args.json or args.csv:
        raise RequestError("a report is a page, not a table: leave --json and --csv out")
    check_drawable(args.target)
    path = checkpoint(args)
    model, tokenizer = read_model(args)
    ids, shell = read_ids(tokenizer, args), Shell(_words(args, "model", "dtype"), _words(args, "text", "tokens"))
    race = lab.race(RACERS)
    print(lab.report(args.target, model, ids, tokenizer=tokenizer, name=path.name, race=race, shell=shell))


def _words(args: argparse.Namespace, *names: str) -> str:
    """The options of these names as the user would give them."""
    given = {name: getattr(args, name) for name in names}
    return shlex.join(word for name, v in given.items() if v is not None for word in (f"--{name}", str(v)))


def _tour(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
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
    predicted = lab.predict(args.plan, args.depth)
    show(predicted.table(), args)
    draw(args, lambda: plan_figures.init_picture(predicted))


def _init(args: argparse.Namespace) -> None:
    measured = lab.init(args.plan, args.depth, dim=args.dim, seeds=args.seeds)
    show(measured.table(), args)
    draw(args, lambda: plan_figures.init_picture(lab.predict(args.plan, args.depth), measured))


def _sweep(args: argparse.Namespace) -> None:
    found = lab.sweep(args.plans, args.depths)
    show(found.table(), args)
    draw(args, lambda: plan_figures.sweep_picture(found))


def _race(args: argparse.Namespace) -> None:
    found = lab.race(args.plans, steps=args.steps)
    show(found.table(), args)
    draw(args, lambda: plan_figures.race_picture(found))


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
