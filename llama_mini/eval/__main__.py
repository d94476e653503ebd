"""Runs lm-eval on our model: python -m llama_mini.eval --model llama_mini --model_args ... --tasks ..."""

import sys
from importlib.util import find_spec

from llama_mini.cli.common import exit_code_of


def main() -> int:
    """Runs lm-eval's command line, which reads sys.argv, and returns the exit code."""
    if find_spec("lm_eval") is None:
        print("error: lm-eval is not installed: pip install 'llama-mini[eval]'", file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate

    import llama_mini.eval.lm_eval  # noqa: F401  registers the model

    return exit_code_of(cli_evaluate)


if __name__ == "__main__":
    sys.exit(main())
