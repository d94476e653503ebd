"""Measures this engine beside the peers that are installed, in turn, on SmolLM2-135M-Instruct.

    python scripts/bench.py [--only decode,prefill,...] [--json FILE]
    python scripts/bench.py --serve [--formats F,...] [--users N,...] [--server NAME=COMMAND ...]
    python scripts/bench.py --profile

Peers: llama.cpp, transformers, OpenVINO, CTranslate2, ONNX Runtime; pip install -e '.[bench]'. Each has a process
of its own, which loads before anything is timed. A round that other programs disturb is repeated. Progress goes to
standard error; the conditions, a table of all series, the ratios against the peers, and one line of JSON to standard
output. If it is stopped, they have what was measured until then.

--serve takes 35 to 80 minutes on two cores, for 3 formats, each with 1, 4, 16 and 32 users: in 2 rounds, which are not
repeated, 64 requests to every server. llama-server gets the settings that are its fastest on up to 24 of them.
"""

import argparse
import signal
import sys
from pathlib import Path

from llama_mini.cli.common import exit_code_of

ROOT = Path(__file__).resolve().parents[1]
TERMINATED = 143


def main() -> int:
    from benchmark import MEASURES, SERVED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = f"of {', '.join(MEASURES)}; all unless given, none with --serve"
    parser.add_argument("--only", metavar="M,...", help=only)
    serve = "measure this project's server under load, beside llama-server if that is on the path"
    parser.add_argument("--serve", action="store_true", help=serve)
    server = (
        "another server to measure beside it: its address, or its command with {port} in place of a port; repeatable"
    )
    parser.add_argument("--server", metavar="NAME=COMMAND", action="append", default=[], help=server)
    formats = f"number formats of --serve, of {', '.join(SERVED)}; all unless given"
    parser.add_argument("--formats", metavar="F,...", help=formats)
    users = "how many users at a time --serve has, one after another; 1,4,16,32 unless given"
    parser.add_argument("--users", metavar="N,...", help=users)
    parser.add_argument("--quick", action="store_true", help="a smoke run of small sizes, whose numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the line of JSON to FILE too")
    parser.add_argument("--profile", action="store_true", help="print where this engine spends its time, and end")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # which ends the processes that it started too
    return exit_code_of(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    from benchmark import MEASURES
    from benchmark.run import profile, run

    if args.profile:
        profile(args.quick)
    else:
        measures = args.only.split(",") if args.only else () if args.serve else MEASURES
        run(measures, args.quick, args.json, ROOT, *_load(args))


def _load(args: argparse.Namespace) -> tuple[dict[str, str] | None, dict[str, list[str] | list[int]]]:
    """The servers beside which this project's is measured, None without --serve, and sizes that replace the usual."""
    from benchmark import SERVED
    from llama_mini.errors import RequestError
    from llama_mini.validate import check_choice, short_repr

    if not args.serve:
        for name in ("server", "formats", "users"):
            if getattr(args, name):
                raise RequestError(f"--{name} is of the measure --serve: give --serve too")
        return None, {}
    servers = {name: command for name, _, command in (each.partition("=") for each in args.server)}
    if wrong := [name for name, command in servers.items() if not (name and command)]:
        raise RequestError(f"--server is NAME=COMMAND or NAME=ADDRESS, not {wrong[0]!r:.80}")
    sizes: dict[str, list[str] | list[int]] = {}
    if args.formats:
        sizes["formats"] = formats = args.formats.split(",")
        for each in formats:
            check_choice("--formats", each, SERVED, RequestError)
    if args.users:
        if not all(each.isdecimal() and int(each) for each in args.users.split(",")):
            raise RequestError(f"--users are whole numbers from 1 on, such as 1,4, not {short_repr(args.users)}")
        sizes["users"] = [int(each) for each in args.users.split(",")]
    return servers, sizes


if __name__ == "__main__":
    sys.exit(main())
