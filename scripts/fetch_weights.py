"""Downloads the default checkpoint, SmolLM2-135M-Instruct, unless it is there, and prints its directory."""

import argparse
import sys

from llama_mini.cli.common import exit_code_of
from llama_mini.cli.default_model import ensure_default_checkpoint

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.exit(exit_code_of(lambda: print(ensure_default_checkpoint())))
