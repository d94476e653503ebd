"""The commands of the lab. Each calls a function of the lab, prints one table and draws one picture."""

import argparse
import json
import shlex
import textwrap
from collections.abc import Callable
from typing import Any

from llama_mini import lab
from llama_mini.checkpoint.io.atomic import check_new
from llama_mini.checkpoint.io.files import decode_json
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.command_io import (
    calibration,
    captured,
    checkpoint,
    draw,
    read_ids,
    read_model,
    read_settings,
    save_model,
    scores,
    show,
)
from llama_mini.lab.cost import Score
from llama_mini.lab.heal_command import heal
from llama_mini.lab.healing_texts import training_text
from llama_mini.lab.massive_activations import MASSIVE, lives
from llama_mini.lab.reporting import figures, plan_figures, stream_figures
from llama_mini.lab.reporting.gain_figures import folded_gain_picture
from llama_mini.lab.reporting.report import Shell
from llama_mini.lab.reporting.style import check_drawable, check_picture
from llama_mini.lab.table import Table
from llama_mini.lab.theory import Profile
from llama_mini.lab.tour import tour
from llama_mini.model.llama import Llama
from llama_mini.model.norm_slots import NormSpec, known_keys
from llama_mini.tokenizer.tokenizer import open_tokenizer
from llama_mini.validate import check_number

WIDTHS = {"en": 100, "ko": 55}  # a Korean letter is two columns wide
TOUR_TEXT = "The quick brown fox jumps over the lazy dog."
RACERS = ("pre", "post")  # of the report


def run(args: argparse.Namespace) -> None:
    """Runs the command that `args` name. Raises LlamaMiniError."""
    for name, check in {"picture": check_picture, "save": check_new}.items():
        if (path := getattr(args, name, None)) is not None:
            check(path)
    COMMANDS[args.command](args)


# --- a checkpoint ---


def _norms(args: argparse.Namespace) -> None:
    model, _ = read_model(args)
    if args.folded:
        gains = lab.folded_gains(model)
        show(args, gains.table(), lambda: folded_gain_picture(gains))
        return
    rows = lab.norms(model)
    show(args, rows, lambda: figures.gain_picture(rows))


def _doctor(args: argparse.Namespace) -> None:
    path = checkpoint(args)
    findings = lab.doctor(path, read_ids(open_tokenizer(open_checkpoint(path)), args))
    show(args, findings, empty="nothing found")


def _capture(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    ids = read_ids(tokenizer, args)
    recording = lab.capture(model, ids, at=args.at, keep="stats" if args.picture is None else "tensors")
    table = recording.massive() if args.massive else captured(recording)
    none = f"no element of {MASSIVE} times the median"
    show(args, table, lambda: figures.residual_rms_picture(recording), none)
    life = lives(recording.massive(), recording.texts.tokens, tokenizer)
    if len(life) and not (args.json or args.csv or args.massive):
        print(f"\nmassive activations, {MASSIVE} times the median of a layer's output and more, by token\n{life}")


def _attention(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    rows = lab.attention(model, read_ids(tokenizer, args))
    show(args, rows, lambda: stream_figures.attention_picture(rows))


def _gradients(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    rows = lab.gradients(model, read_ids(tokenizer, args))
    show(args, rows, lambda: stream_figures.gradient_picture(rows))


def _compare(args: argparse.Namespace) -> None:
    if args.csv:
        raise RequestError("a comparison is several tables: leave --csv out, or print them with --json")
    (a, tokenizer), (b, other) = (read_model(args, name) for name in (args.a, args.b))
    ids = read_ids(tokenizer, args)
    if read_ids(other, args) != ids:
        raise RequestError(
            f"the tokenizers of {args.a} and {args.b} split the text differently: their losses differ too"
        )
    compared = lab.compare(a, b, ids, args.pattern, **read_settings(args.settings))
    tables = {"losses": scores({"a": compared.a, "b": compared.b}), "norms": compared.norms, "stream": compared.stream}
    if args.json:
        print(json.dumps({name: json.loads(table.to_json()) for name, table in tables.items()}, indent=2))
    else:
        print("\n\n".join(f"{name}\n{table}" for name, table in tables.items()))
    draw(args, lambda: stream_figures.comparison_picture(compared))
    _check_finite(compared.norms)


def _ablate(args: argparse.Namespace) -> None:
    if args.joint and args.picture is not None:
        raise RequestError("--joint gives one cost, and no picture: leave --picture out")
    model, tokenizer = read_model(args)
    ids, settings, calibrate = read_ids(tokenizer, args), read_settings(args.settings), calibration(tokenizer, args)
    together = {"joint": args.joint, "cumulative": args.cumulative}
    costs = lab.ablate(model, ids, args.pattern, calibrate=calibrate, **together, **settings)
    draw = figures.cumulative_picture if args.cumulative else figures.norm_cost_picture
    show(args, costs, lambda: draw(costs))
    _check_finite(costs)


def _edit(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    ids, settings = read_ids(tokenizer, args), read_settings(args.settings) or {"eps": 1e-3}
    edit = {args.pattern: settings}, ids, calibration(tokenizer, args)
    base, name = lab.score(model, ids), f"{args.pattern} {settings}"
    if args.save is None:
        with lab.edit(model, *edit):
            _show_cost(args, base, model, ids, name)
    else:
        new = lab.edited(model, *edit)
        _show_cost(args, base, new, ids, name)
        save_model(args, new)


def _skip(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    costs = lab.skip_layers(model, read_ids(tokenizer, args), args.pattern, args.run)
    show(args, costs, lambda: figures.skip_picture(costs))
    _check_finite(costs)


def _check_finite(rows: Table[Any]) -> None:
    if errors := [row.error for row in rows if row.error is not None]:
        has = "has" if len(errors) == 1 else "have"
        raise NumericalError(f"{len(errors)} of {len(rows)} rows {has} no cost: {errors[0]}")


def _audit(args: argparse.Namespace) -> None:
    model, tokenizer = read_model(args)
    rows = lab.audit(model, read_ids(tokenizer, args), args.most)
    show(args, rows)
    _check_finite(rows)


def _move(args: argparse.Namespace) -> None:
    def moved(model: Llama, ids: list[list[int]]) -> Llama:
        if args.fit:
            return lab.move_fitted(model, args.pattern, args.to, ids)
        return lab.move(model, args.pattern, to=args.to)

    _rebuild(args, moved, f"moved to {args.to}")


def _insert(args: argparse.Namespace) -> None:
    try:
        norm = NormSpec(**known_keys(decode_json(args.norm), NormSpec, "--norm"))
    except ValueError as error:
        raise RequestError(f'--norm {error}; write it as in a plan, such as {{"kind": "layer"}}') from None
    _rebuild(args, lambda model, ids: lab.insert(model, args.pattern, ids, args.gain, norm), "with new norms")


def _fold(args: argparse.Namespace) -> None:
    _rebuild(args, lambda model, _: lab.fold(model, args.pattern), "folded")


def _rebuild(args: argparse.Namespace, rebuild: Callable[[Llama, list[list[int]]], Llama], name: str) -> None:
    model, tokenizer = read_model(args)
    ids = read_ids(tokenizer, args)
    new = rebuild(model, ids)
    _show_cost(args, lab.score(model, ids), new, ids, name)
    save_model(args, new)


def _show_cost(args: argparse.Namespace, base: Score, model: Llama, ids: list[list[int]], name: str) -> None:
    show(args, scores({"as it is": base, name: lab.score(model, ids, against=base)}))


def _report(args: argparse.Namespace) -> None:
    if args.json or args.csv:
        raise RequestError("a report is a page, not a table: leave --json and --csv out")
    check_drawable(args.target)
    path = checkpoint(args)
    model, tokenizer = read_model(args)
    text = _words(args, "text", "offset", "tokens", "rows", "bos")
    ids, shell = read_ids(tokenizer, args), Shell(_words(args, "model", "dtype"), text)
    other = calibration(tokenizer, args) or [training_text(tokenizer)[: args.tokens].tolist()]
    race = lab.race(RACERS)
    page = lab.report(
        args.target, model, ids, calibrate=other, tokenizer=tokenizer, name=path.name, race=race, shell=shell
    )
    print(page)


def _words(args: argparse.Namespace, *names: str) -> str:
    """The options of these names as the user would type them."""
    words: list[str] = []
    for name in names:
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return shlex.join(words)


def _tour(args: argparse.Namespace) -> None:
    if args.csv:
        raise RequestError("a tour is a text, not a table: leave --csv out")
    model, tokenizer = read_model(args)
    steps = tour(model, tokenizer.encode(TOUR_TEXT), args.lang)
    if args.json:
        print(json.dumps([vars(step) for step in steps], indent=2, ensure_ascii=False))
        return
    for step in steps:
        numbers = "\n".join(f"    {line}" for line in step.numbers)
        text = textwrap.fill(step.text, WIDTHS[args.lang])
        print(f"{step.title}\n\n{text}\n\n{numbers}\n", flush=True)


# --- a plan ---


def _predict(args: argparse.Namespace) -> None:
    predicted = _predicted(args)
    show(args, predicted.table(), lambda: plan_figures.init_picture(predicted))


def _init(args: argparse.Namespace) -> None:
    feed_forward = {"activation": args.activation, "gated": not args.no_gate}
    measured = lab.init(args.plan, args.depth, dim=args.dim, seeds=args.seeds, **feed_forward)
    show(args, measured.table(), lambda: plan_figures.init_picture(_predicted(args), measured))


def _predicted(args: argparse.Namespace) -> Profile:
    return lab.predict(args.plan, args.depth, activation=args.activation, gated=not args.no_gate)


def _sweep(args: argparse.Namespace) -> None:
    sweep = lab.sweep(args.plans, args.depths, dim=args.dim, seeds=args.seeds)
    show(args, sweep.table(), lambda: plan_figures.sweep_picture(sweep))


def _race(args: argparse.Namespace) -> None:
    for rate in args.learning_rate:  # before the first race
        check_number("learning_rate", rate, RequestError, above=0)
    sizes = {name: getattr(args, name) for name in ("steps", "seeds", "depth", "dim", "warmup_steps")}
    races = [lab.race(args.plans, learning_rate=rate, **sizes) for rate in dict.fromkeys(args.learning_rate)]
    rows = Table([row for race in races for row in race.table()])
    show(args, rows, lambda: plan_figures.race_picture(*races))


_WATCHING = (_norms, _doctor, _capture, _attention, _gradients, _compare)
_OF_A_CHECKPOINT = (*_WATCHING, _ablate, _edit, _skip, _audit, _move, _insert, _fold, _report, _tour)
_OF_A_PLAN = (_predict, _init, _sweep, _race)
COMMANDS = {command.__name__[1:]: command for command in (*_OF_A_CHECKPOINT, *_OF_A_PLAN)} | {"heal": heal}
