"""`llama-mini convert` for a checkout: python scripts/convert.py SRC DST."""

import sys

from llama_mini.__main__ import run_convert

if __name__ == "__main__":
    sys.exit(run_convert(sys.argv[1:], "python scripts/convert.py"))
