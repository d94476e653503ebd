"""Fetches the default checkpoint, SmolLM2-135M-Instruct, if it is not there yet, and prints its directory."""

import argparse
import sys

from llama_mini.cli.default_model import ensure_default_checkpoint
from llama_mini.errors import LlamaMiniError


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        print(ensure_default_checkpoint())
    except LlamaMiniError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
