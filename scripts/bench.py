"""Measures this engine beside the peers that are installed, in turn, on SmolLM2-135M-Instruct.

    python scripts/bench.py [--only decode,prefill,...] [--json FILE]
    python scripts/bench.py --profile

Peers: llama.cpp, transformers, OpenVINO GenAI, CTranslate2; pip install -e '.[bench]'. Each engine has a process of its
own, which loads before anything is timed. A round that other programs disturb is repeated. Progress goes to standard
error; the conditions, a table of all series, the ratios against the peers, and one line of JSON to standard output.
"""

import argparse
import sys
from pathlib import Path

from llama_mini.cli.common import exit_code_of

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    from benchmark import MEASURES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="M,...", default=",".join(MEASURES), help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true", help="a smoke run of small sizes, whose numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the line of JSON to FILE too")
    parser.add_argument("--profile", action="store_true", help="print where this engine spends its time, and end")
    return exit_code_of(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    from benchmark.run import profile, run

    if args.profile:
        profile(args.quick)
    else:
        run(args.only.split(","), args.quick, args.json, ROOT)


if __name__ == "__main__":
    sys.exit(main())
