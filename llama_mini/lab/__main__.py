"""The command line of the norm lab: python -m llama_mini.lab COMMAND.

A table, JSON or CSV goes to standard output, a picture to a file, all else to standard error. torch is imported only
when a command runs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_mini.cli.common import checkpoint_of, exit_code_of
from llama_mini.cli.parser import Parser
from llama_mini.lab.settings_help import SETTINGS_HELP

PROG = "python -m llama_mini.lab"
LAYER_NORMS = "layers.*.*.*"
PLANS = ("pre", "post", "peri", "out+qk", "deep")
PLAN = "a preset such as out+qk, a plan as JSON, or a .json file of one"


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command line and returns its exit code; the codes are those of llama_mini.generate."""
    return exit_code_of(lambda: run(parser(prog).parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the parsed options ask for. Raises LlamaMiniError."""
    if "settings" in args and "=" in (args.pattern or ""):  # a setting, in a command line without a pattern
        args.settings = [args.pattern, *args.settings]
        args.pattern = LAYER_NORMS if args.command in ("ablate", "edit") else None
    from llama_mini.lab import commands

    args.checkpoint = lambda name: checkpoint_of(name or args.model)
    if getattr(args, "save", None) is not None:  # the lab does not import the commands
        from llama_mini.cli.convert import tokenizer_files, write_files

        args.save_tokenizer = lambda source, folder: write_files(folder, tokenizer_files(source))
    commands.run(args)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = Parser(
        prog=prog,
        description="Studies norms: those of a real checkpoint, of a plan at random init, or in short trainings.",
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    output, model, text, picture = _shared()

    def add(name: str, help: str, *parents: argparse.ArgumentParser, epilog: str = "") -> argparse.ArgumentParser:
        description, form = f"{help[0].upper()}{help[1:]}.", argparse.RawDescriptionHelpFormatter
        return commands.add_parser(
            name, help=help, description=description, epilog=epilog, formatter_class=form, parents=[*parents, output]
        )

    norms = add("norms", "list every norm with its settings and gains", model, picture)
    folded = "instead: gain times the length of the columns that read it, by layer and dimension in the picture"
    norms.add_argument("--folded", action="store_true", help=folded)
    add("doctor", "look for likely problems of the norms", model, text)
    capture = add("capture", "show what each norm reads, and the residual stream, on a text", model, text, picture)
    capture.add_argument("--at", metavar="PATTERN", action="append", help="norms to show; default: all")
    capture.add_argument("--massive", action="store_true", help="show the massive activations alone, layer by layer")
    add("attention", "show what each head attends to, beside the residual stream", model, text, picture)
    add("gradients", "show the gradient of the loss along the stream and at each norm", model, text, picture)
    compare = add("compare", "show two checkpoints side by side: losses, gains, streams and costs", text, picture)
    for name in "ab":
        compare.add_argument(name, metavar=name.upper(), help="directory, file or hub name")
    compare.add_argument("pattern", nargs="?", help="norms whose cost is measured; default: all that can be")
    compare.add_argument("--dtype", default="float32", metavar="D", help="of both; default: %(default)s")
    ablate = add("ablate", "measure the cost of changing each norm", model, text, picture, epilog=SETTINGS_HELP)
    edit = add("edit", "measure the cost of editing norms", model, text, epilog=SETTINGS_HELP)
    skip = add("skip", "measure the cost of skipping layers, their branches, or runs of them", model, text, picture)
    layers = "layers or branches, such as layers.20-29.attention or layers.*.*; default: %(default)s"
    skip.add_argument("pattern", nargs="?", default="layers.*", help=layers)
    skip.add_argument(
        "--run", type=int, default=1, metavar="N", help="skip N neighbours together; default: %(default)s"
    )
    audit = add(
        "audit", "say which norms fold, cancel against a later norm or can go, and what that costs", model, text
    )
    audit.add_argument(
        "--most", type=float, default=0.01, metavar="F", help="nats a norm that can go costs; default: %(default)s"
    )
    move = add("move", "measure the cost of moving norms to another slot", model, text)
    insert = add("insert", "measure the cost of new norms in empty slots", model, text)
    fold = add("fold", "fold gains into the weights that read them, and compare", model, text)
    for command, pattern in (
        (ablate, LAYER_NORMS),
        (edit, LAYER_NORMS),
        (move, "layers.*.feed_forward.pre_norm"),
        (insert, "layers.*.*.out_norm"),
    ):
        command.add_argument(
            "pattern", nargs="?", default=pattern, help="norms, such as layers.0-3.*.*,norm; default: %(default)s"
        )
    fold.add_argument("pattern", nargs="?", help="norms; default: all whose gain can be folded")
    for command, default in ((ablate, "freeze=quadratic"), (compare, "freeze=quadratic"), (edit, "eps=1e-3")):
        what = f"such as freeze=median keep=massive: see edit --help; default: {default}"
        command.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=what)
    for command in (ablate, edit):
        calibrate = "measure the constants of freeze on this text instead"
        command.add_argument("--calibrate", type=Path, metavar="FILE", action="append", help=calibrate)
    together = ablate.add_mutually_exclusive_group()
    together.add_argument("--joint", action="store_true", help="change all norms together, in one row")
    together.add_argument("--cumulative", action="store_true", help="one after another, the cheapest next")
    in_order = "one after another, the parts of the pattern in their order, which commas separate"
    together.add_argument("--in-order", dest="cumulative", action="store_const", const="given", help=in_order)
    move.add_argument("--fit", action="store_true", help="fit gains and matrices to the new places on the text")
    move.add_argument("--to", default="out", metavar="SLOT", help="pre, mid, out or post; default: %(default)s")
    gain = "lstsq (default): the gains that change the function least, fitted on the text; one: all gains 1"
    insert.add_argument("--gain", choices=["lstsq", "one"], default="lstsq", help=gain)
    norm = """settings of the norms as in a plan, such as '{"kind": "layer"}'; default: RMSNorm"""
    insert.add_argument("--norm", default="{}", metavar="JSON", help=norm)
    for command in (edit, move, insert, fold):
        command.add_argument("--save", type=Path, metavar="DIR", help="write the new model to this folder")
    _heal_options(
        add("heal", "train a changed model back for a few minutes, and say what stays lost", model, text, picture)
    )

    predict = add("predict", "predict second moments, gradients and angles of a plan at random init", picture)
    init = add("init", "measure what predict computes, on random models", picture)
    for command in (predict, init):
        command.add_argument("plan", nargs="?", default="pre", help=f"{PLAN}; default: %(default)s")
        command.add_argument("--depth", type=int, default=16, metavar="N", help="layers; default: %(default)s")
        command.add_argument("--activation", default="silu", metavar="A", help="silu (default), gelu_tanh, gelu, relu2")
        command.add_argument("--no-gate", action="store_true", help="feed-forward layers without a gate")
    sweep = add("sweep", "measure how gradients at random init grow with depth", picture)
    race = add("race", "train small models for a few steps", picture)
    for command, plans in ((sweep, PLANS), (race, ("pre", "post"))):
        each = f"each {PLAN}; default: {' '.join(plans)}"
        command.add_argument("plans", nargs="*", default=list(plans), metavar="plan", help=each)
    for command, dim in ((init, 256), (sweep, 64), (race, 64)):
        command.add_argument("--dim", type=int, default=dim, metavar="N", help="width; default: %(default)s")
        seeds = "random models of each plan, whose standard deviation is the spread; default: %(default)s"
        command.add_argument("--seeds", type=int, default=3, metavar="N", help=seeds)
    sweep.add_argument(
        "--depths", type=int, nargs="+", default=[2, 4, 8, 16], metavar="N", help="layers; default: 2 4 8 16"
    )
    race.add_argument("--depth", type=int, default=12, metavar="N", help="layers; default: %(default)s")
    race.add_argument("--steps", type=int, default=150, metavar="N", help="default: %(default)s")
    rates = "of AdamW; several: a race for each; default: 3e-3"
    race.add_argument("--learning-rate", type=float, nargs="+", default=[3e-3], metavar="R", help=rates)
    warmup = "steps in which it grows to that; default: %(default)s"
    race.add_argument("--warmup-steps", type=int, default=0, metavar="N", help=warmup)
    report = add("report", "write a report on the checkpoint's norms as one HTML page", model, text)
    report.add_argument("target", nargs="?", type=Path, default=Path("norms.html"), help="file; default: %(default)s")
    calibrate = "show the constants of frozen norms on this text too; default: Python's language reference"
    report.add_argument("--calibrate", type=Path, metavar="FILE", action="append", help=calibrate)
    tour = add("tour", "explain what RMSNorm computes, step by step, on real activations", model)
    tour.add_argument("--lang", choices=["en", "ko"], default="en", help="default: %(default)s")
    return p


def _heal_options(heal: argparse.ArgumentParser) -> None:
    pattern = "norms to change; default: feed_forward.pre_norm (--insert: out_norm) of the last third of the layers"
    heal.add_argument("pattern", nargs="?", help=pattern)
    heal.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="an edit of these norms, see edit --help; without one they are moved",
    )
    heal.add_argument("--to", metavar="SLOT", help="move them there, as move --fit does; default: out")
    heal.add_argument("--insert", action="store_true", help="fill these slots, with gains of least squares")
    heal.add_argument("--minutes", type=float, default=2.0, metavar="F", help="of training; default: %(default)s")
    heal.add_argument("--steps", type=int, metavar="N", help="exactly so many steps instead, of 2 x 256 tokens")
    heal.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    train = "text to train on; default: Python's language reference, and what the model writes"
    heal.add_argument("--train", type=Path, metavar="FILE", help=train)
    heal.add_argument("--taper", action="store_true", default=None, help="let the change come in slowly")
    heal.add_argument("--no-control", dest="control", action="store_false", help="train no random change of equal KL")
    heal.add_argument("--folder", type=Path, metavar="DIR", help="keep the state here, and go on from it")
    heal.add_argument("--save", type=Path, metavar="DIR", help="write the healed model to this folder")


def _shared() -> list[argparse.ArgumentParser]:
    """Options that several commands share: output, model, text and picture."""
    output, model, text, picture = parsers = [argparse.ArgumentParser(add_help=False) for _ in range(4)]
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    model.add_argument("--model", metavar="M", help="directory, file or hub name; default: SmolLM2-135M-Instruct")
    model.add_argument("--dtype", default="float32", metavar="D", help="default: %(default)s")
    text.add_argument(
        "--text", type=Path, metavar="FILE", action="append", help="several times: several texts; default: Alice"
    )
    for name, default, what in (
        ("offset", 0, "leave out the first N tokens of each text"),
        ("tokens", 256, "then read N tokens"),
        ("rows", 1, "so many times, one row after another"),
    ):
        text.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default: %(default)s")
    text.add_argument("--bos", action="store_true", help="begin each row with the tokenizer's BOS token")
    picture.add_argument("--picture", type=Path, metavar="FILE", help="also draw a picture: .png or .svg")
    return parsers


if __name__ == "__main__":
    sys.exit(main())
