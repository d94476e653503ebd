"""The command line of the norm lab: python -m llama_mini.lab COMMAND.

A table, JSON or CSV goes to standard output, a picture to a file, all else to standard error. torch is imported only
once there is something to run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_mini.cli.common import checkpoint_of, exit_code_of

PROG = "python -m llama_mini.lab"
PLANS = ("pre", "post", "peri", "out+qk", "deep")


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command line and returns its exit code, as that of llama_mini.generate."""
    args = parser(prog).parse_args(argv)
    from llama_mini.lab import commands

    if "model" in args:
        args.checkpoint = lambda: checkpoint_of(args.model)
    return exit_code_of(lambda: commands.run(args))


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=prog,
        description="Studies norms: those of a real checkpoint, of a plan at random init, or in short trainings.",
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    out = _output()
    model, text, picture = _model(), _text(), _picture()

    def add(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help + ".", parents=[*parents, out])

    add("norms", "list every norm, with its eps and gains", model, picture)
    add("doctor", "look for what is wrong with the norms", model, text)
    capture = add("capture", "what each norm sees on a text, and the residual stream", model, text, picture)
    capture.add_argument("--at", metavar="PATTERN", action="append", help="norms to look at; default: all")
    ablate = add("ablate", "what each norm costs when its statistic is frozen", model, text, picture)
    ablate.add_argument(
        "pattern", nargs="?", default="layers.*.*.pre_norm", help="or several, with commas; default: %(default)s"
    )
    ablate.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="an edit; default: freeze=mean")
    ablate.add_argument("--drop-first", action="store_true", help="freeze token 0 as well")
    edit = add("edit", "what an edit of norms costs", model, text)
    edit.add_argument("pattern", nargs="?", default="layers.*.*.pre_norm", help="default: %(default)s")
    edit.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="such as eps=1e-3 kind=layer; default: eps=1e-3")
    add("skip", "what leaving out each layer costs", model, text, picture)
    move = add("move", "what moving norms to another slot costs", model, text)
    move.add_argument("pattern", nargs="?", default="layers.*.feed_forward.pre_norm", help="default: %(default)s")
    move.add_argument("--to", default="out", metavar="SLOT", help="pre, mid, out or post; default: %(default)s")
    fold = add("fold", "fold gains into the weights that read them, and show that nothing changes", model, text)
    fold.add_argument("pattern", nargs="?", help="default: every gain that can be folded")
    for command in (move, fold):
        command.add_argument("--save", type=Path, metavar="DIR", help="write the new model there")

    predict = add("predict", "second moments, gradients and angles of a plan by theory alone", picture)
    init = add("init", "the same, measured at random init", picture)
    for command in (predict, init):
        command.add_argument("plan", nargs="?", default="pre", help="a preset such as out+qk; default: %(default)s")
        command.add_argument("--depth", type=int, default=16, metavar="N", help="layers; default: %(default)s")
    init.add_argument("--dim", type=int, default=256, metavar="N", help="width; default: %(default)s")
    init.add_argument("--seeds", type=int, default=3, metavar="N", help="random models; default: %(default)s")
    sweep = add("sweep", "how gradients at init grow with depth", picture)
    sweep.add_argument("plans", nargs="*", default=list(PLANS), help=f"default: {' '.join(PLANS)}")
    sweep.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16], metavar="N", help="default: 2 4 8 16")
    race = add("race", "short trainings of small models, without warm-up", picture)
    race.add_argument("plans", nargs="*", default=["pre", "post"], help="default: pre post")
    race.add_argument("--steps", type=int, default=150, metavar="N", help="default: %(default)s")
    report = add("report", "all of it as one page", model, text)
    report.add_argument("target", nargs="?", type=Path, default=Path("norms.html"), help="default: %(default)s")
    tour = add("tour", "what RMSNorm computes, step by step, on real activations", model)
    tour.add_argument("--lang", choices=["en", "ko"], default="en", help="default: %(default)s")
    return p


def _output() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(add_help=False)
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    return p


def _picture() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--picture", type=Path, metavar="FILE", help="draw it too: a .png or .svg file")
    return p


def _model() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--model", metavar="M", help="directory, file or hub name; default: SmolLM2-135M-Instruct")
    p.add_argument("--dtype", default="float32", metavar="D", help="default: %(default)s")
    return p


def _text() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--text", type=Path, metavar="FILE", help="default: the beginning of Alice in Wonderland")
    p.add_argument("--tokens", type=int, default=256, metavar="N", help="its first N tokens; default: %(default)s")
    return p


if __name__ == "__main__":
    sys.exit(main())
