"""Every command under one name: `llama-mini COMMAND ...`, or `python -m llama_mini COMMAND ...`.

Words that do not begin with a command go to `generate`, so that `llama-mini "Why is the sky blue?"` answers. torch is
imported only once there is something to run.
"""

import difflib
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from llama_mini import generate
from llama_mini.cli import options
from llama_mini.cli.common import exit_code_of
from llama_mini.errors import LlamaMiniError, RequestError

COMMANDS = {
    "generate": "answer a prompt, or a file of prompts",
    "chat": "chat at the terminal",
    "serve": "serve a model to clients of OpenAI's API, and a page to chat with",
    "score": "measure the perplexity of texts",
    "info": "describe a checkpoint without loading it",
    "convert": "convert a checkpoint to a Hugging Face directory",
    "eval": "run the tasks of lm-eval",
    "lab": "study the norms of a model",
    "bench": "measure the speed against other engines",
}
NO_CHECKOUT = "bench is not in the installed package: clone the repository and run pip install -e '.[bench]' there"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 usage, 3 checkpoint, 4 capacity, 1 other, 130 Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m llama_mini" if Path(sys.argv[0]).name == "__main__.py" else "llama-mini"
    if words in (["-h"], ["--help"]) or (not words and sys.stdin is not None and sys.stdin.isatty()):
        return exit_code_of(lambda: print(_help(prog)))
    if words and words[0] in COMMANDS:
        return _run(words[0], words[1:], f"{prog} {words[0]}")
    return exit_code_of(lambda: _check_prompt(words, prog)) or generate.main(words, f"{prog} generate")


def _run(command: str, argv: list[str], prog: str) -> int:
    match command:
        case "chat":
            return exit_code_of(lambda: _run_mode("--interactive", options.chat_parser(prog), argv))
        case "info":
            return exit_code_of(lambda: _run_mode("--info", options.info_parser(prog), argv))
        case "convert":
            return run_convert(argv, prog)
        case "generate" | "score" | "serve":
            return import_module(f"llama_mini.{command}").main(argv, prog)
        case "lab":
            return import_module("llama_mini.lab.__main__").main(argv, prog)
    sys.argv = [prog, *argv]  # lm-eval and the bench read their options from it
    if command == "eval":
        return import_module("llama_mini.eval.__main__").main()
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    sys.path.insert(0, str(scripts))
    return exit_code_of(lambda: _check_checkout(scripts)) or import_module("bench").main()


def _check_checkout(scripts: Path) -> None:
    if not (scripts / "bench.py").is_file():
        raise LlamaMiniError(NO_CHECKOUT)


def _run_mode(mode: str, parser: ArgumentParser, argv: list[str]) -> None:
    """Runs a mode of `generate` as a command of its own, with some of generate's options."""
    generate.run(parser.parse_args(argv, options.parser().parse_args([mode])))


def run_convert(argv: Sequence[str], prog: str) -> int:
    """The command `convert`; scripts/convert.py runs it too."""

    def run() -> None:
        args = options.convert_parser(prog).parse_args(argv)
        from llama_mini.checkpoint.io.lock import one_writer
        from llama_mini.checkpoint.open import resolve
        from llama_mini.cli.convert import convert

        with one_writer(args.target):  # this also removes the files of earlier runs that were killed
            convert(resolve(args.source), args.target, args.dtype, options.adapters(args))
        print(args.target)

    return exit_code_of(run)


def _help(prog: str) -> str:
    commands = "\n".join(f"  {name:10}{meaning}" for name, meaning in COMMANDS.items())
    return (
        f"usage: {prog} COMMAND ...\n       {prog} [options] [PROMPT]\n\n"
        f"Runs LLaMA-family models. Without a COMMAND, `generate` answers PROMPT.\n\ncommands:\n{commands}\n\n"
        f"`{prog} COMMAND --help` lists the options of a command."
    )


def _check_prompt(words: list[str], prog: str) -> None:
    """Refuses several words without a command: RequestError. A single word close to a command gets a note."""
    first = words[0] if words else "-"
    if first.startswith("-") or len(first.split()) != 1:
        return
    close = "".join(difflib.get_close_matches(first, COMMANDS, n=1, cutoff=0.75))
    if len(words) > 1 and not words[1].startswith("-"):
        if options.is_checkpoint(first):
            raise RequestError(f"{first!r} is the path of a model: give it as --model {first}")
        hint = f" (did you mean {close}?);" if close else ";"
        raise RequestError(f"{first!r} is not a command{hint} put quotes around a prompt; {prog} --help lists commands")
    if close:
        print(f"note: {first!r} is read as a prompt; the command is {close}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
