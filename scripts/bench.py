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

from llama_mini.errors import LlamaMiniError

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    from benchmark.run import MEASURES, profile, run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="M,...", default=",".join(MEASURES), help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true", help="a smoke run of small sizes, whose numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the line of JSON to FILE too")
    parser.add_argument("--profile", action="store_true", help="print where this engine spends its time, and end")
    args = parser.parse_args()
    try:
        if args.profile:
            profile(args.quick)
        else:
            run(args.only.split(","), args.quick, args.json, ROOT)
    except LlamaMiniError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
