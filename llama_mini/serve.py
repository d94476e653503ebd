"""The command `serve`: python -m llama_mini.serve --model M --port 8000

An OpenAI-compatible server. The log goes to standard error. torch is imported only once there is something to serve.
"""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama_mini import __version__
from llama_mini.cli.common import checkpoint_of, exit_code_of
from llama_mini.cli.options import adapters, engine_options, model_options
from llama_mini.cli.parser import Parser
from llama_mini.errors import LlamaMiniError
from llama_mini.server.settings import Settings

PROG = "python -m llama_mini.serve"
KEY = "LLAMA_MINI_API_KEY"
INSTALL = "the server needs starlette, uvicorn and prometheus-client: pip install 'llama-mini[serve]'"


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command line; the exit codes are those of llama_mini.generate, 0 after SIGTERM or Ctrl-C."""
    return exit_code_of(lambda: run(parser(prog).parse_args(argv)))


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = Parser(
        prog=prog,
        description="Serves a model to clients of OpenAI's API, and a page to chat with. SIGTERM or Ctrl-C: requests "
        "that run may finish; a second one ends them.",
    )
    p.add_argument("--version", action="version", version=f"llama_mini {__version__}")
    engine_options(model_options(p))
    name = "name of the model for clients; may be repeated, responses have the first; default: that of its path"
    p.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=name)
    add = p.add_argument_group("address").add_argument
    host = "address to listen at; default 127.0.0.1: only this machine; any that others reach needs a key"
    add("--host", default="127.0.0.1", metavar="ADDR", help=host)
    add("--port", type=int, default=8000, metavar="N", help="port; default 8000; 0: a free one, which is printed")
    add = p.add_argument_group("access").add_argument
    key = f"key that requests must have; may be repeated; default: that of {KEY}, which no list of processes shows"
    add("--api-key", action="append", default=[], metavar="KEY", help=key)
    names = "name by which clients may address it, besides localhost; may be repeated; with keys, default: any"
    add("--allowed-host", action="append", default=[], metavar="NAME", help=names)
    pages = "other web pages that may ask, such as https://example.com; may be repeated; *: any"
    add("--allowed-origin", action="append", default=[], metavar="ORIGIN", help=pages)
    add = p.add_argument_group("load").add_argument
    queue = f"answers that may run and wait; more get status 503; default {Settings.max_queue}"
    add("--max-queue", type=int, default=Settings.max_queue, metavar="N", help=queue)
    grace = f"time to finish for requests that run when it is stopped; default {Settings.grace_seconds:g}"
    add("--grace", type=float, default=Settings.grace_seconds, metavar="SECONDS", help=grace)
    return p


def run(args: argparse.Namespace) -> None:
    """Serves until it is stopped. Raises LlamaMiniError."""
    merged = adapters(args)
    settings = Settings(
        api_keys=tuple(args.api_key or filter(None, [os.environ.get(KEY)])),
        allowed_hosts=tuple(args.allowed_host),
        allowed_origins=tuple(args.allowed_origin),
        max_queue=args.max_queue,
        grace_seconds=args.grace,
    )
    try:
        from llama_mini.server.app import create_app
        from llama_mini.server.run import bind, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("starlette", "uvicorn", "prometheus_client"):
            raise LlamaMiniError(INSTALL) from None
        raise
    from llama_mini.engine.llm import LLM
    from llama_mini.lab.edits_file import edited_by

    with bind(args.host, args.port, settings) as listener:
        model = checkpoint_of(args.model, merged)
        engine = {"draft": args.draft, "speculation": args.speculation, "kv_dtype": args.kv_dtype}
        llm = LLM(model, args.dtype, args.device, args.quantize, args.kernels, args.threads, merged, **engine)
        names = args.served_model_name or [Path(model).name if Path(model).exists() else str(model)]
        settings = replace(settings, model_names=tuple(names))
        with edited_by(llm, args.edit):
            gc.freeze()  # what is loaded stays: looking through it for garbage would delay tokens by 0.1 s
            serve(create_app(llm, settings), settings, listener)


if __name__ == "__main__":
    sys.exit(main())
