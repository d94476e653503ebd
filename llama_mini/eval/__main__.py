"""lm-eval with the model `llama_mini`: python -m llama_mini.eval --model llama_mini --model_args ... --tasks ..."""

import sys
from importlib.util import find_spec

from llama_mini.cli.common import exit_code_of


def main() -> int:
    """Runs lm-eval's own command, which takes its options from sys.argv, and returns its exit code."""
    if find_spec("lm_eval") is None:
        print("error: lm-eval is not installed: pip install 'llama-mini[eval]'", file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate

    import llama_mini.eval.lm_eval  # noqa: F401  registers the model

    return exit_code_of(cli_evaluate)


if __name__ == "__main__":
    sys.exit(main())
