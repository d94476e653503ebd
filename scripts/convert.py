"""Turns a checkpoint of any format into a Hugging Face directory, which this engine and transformers open as it is.

    python scripts/convert.py SRC DST

SRC is a Meta directory (params.json, consolidated.*.pth, tokenizer.model), a GGUF file, a Hugging Face directory with
safetensors or pickles, or a hub name. Of pickles, only plain tensors are read. DST must be new or empty; it is there
whole at the end, or not at all.
"""

import argparse
import sys
import warnings
from pathlib import Path

from llama_mini.errors import LlamaMiniError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="a directory, a file or a hub name")
    parser.add_argument("target", metavar="DST", type=Path, help="the directory to write")
    parser.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16; default: as it is stored")
    args = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)

    from llama_mini.checkpoint.io.lock import one_writer
    from llama_mini.checkpoint.open import resolve
    from llama_mini.cli.convert import convert

    try:
        with one_writer(args.target):  # it clears what killed runs left, too
            convert(resolve(args.source), args.target, args.dtype)
    except LlamaMiniError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    print(args.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
