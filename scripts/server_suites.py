"""Runs vLLM's and llama.cpp's own tests of their servers against this one, and compares with tests/server/suites.toml.

    python scripts/server_suites.py [vllm] [llama.cpp] [-v] [-k EXPRESSION]

The tests are downloaded as their projects' source packages, of a pinned version and checksum, into the user's cache;
none of their code is in this repository. Needs pip install -e '.[suites]'. Ends with status 1 if an outcome differs.
"""

import argparse
import signal
import sys
from pathlib import Path

from llama_mini.cli.common import exit_code_of
from llama_mini.errors import LlamaMiniError, RequestError
from llama_mini.validate import check_choice

LIST = Path(__file__).resolve().parents[1] / "tests" / "server" / "suites.toml"


def main() -> int:
    from suites.running import STOPS, SUITES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="*", help=f"of {', '.join(SUITES)}; all unless given")
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests whose names match, as for pytest")
    parser.add_argument("-v", action="store_true", help="print the outcome of every test")
    for number in STOPS:  # each as Ctrl-C: what was started has to end
        signal.signal(number, signal.default_int_handler)
    return exit_code_of(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    from suites.running import SUITES, differences, outcomes_of, read_list

    for suite in args.suite:
        check_choice("suite", suite, SUITES, RequestError)
    found = []
    for suite in args.suite or SUITES:
        outcomes = outcomes_of(suite, args.k)
        if args.v:
            print("".join(f"{'failed' if error else 'passed'} {test} {error}\n" for test, error in outcomes.items()))
        lines = differences(outcomes, read_list(LIST, suite), is_part=args.k is not None)
        print("\n".join([*lines, f"{suite}: {sum(not error for error in outcomes.values())} of {len(outcomes)} pass"]))
        found += lines
    if found:
        raise LlamaMiniError(f"{len(found)} outcomes are not as in {LIST}")


if __name__ == "__main__":
    sys.exit(main())
