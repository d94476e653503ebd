"""Runs lm-eval on our model: python -m llama_mini.eval --model llama_mini --model_args ... --tasks ..."""

import sys
from importlib.util import find_spec

from llama_mini.cli.common import exit_code_of
from llama_mini.errors import LlamaMiniError


def main() -> int:
    """Runs lm-eval's command line, which reads sys.argv, and returns the exit code."""
    return exit_code_of(_run)


def _run() -> None:
    if find_spec("lm_eval") is None:
        raise LlamaMiniError("lm-eval is not installed: pip install 'llama-mini[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import llama_mini.eval.lm_eval  # noqa: F401  registers the model

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
