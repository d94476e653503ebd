"""Perplexity of texts from the command line: python -m llama_mini.score TEXTFILE

The figures go to standard output, all else to standard error. torch is imported only once there is something to run.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_mini import __version__
from llama_mini.cli.common import as_text, checkpoint_of, exit_code_of, read_standard_input
from llama_mini.cli.options import model_options
from llama_mini.errors import RequestError

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.eval.perplexity import Comparison, Perplexity


PROG = "python -m llama_mini.score"


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command line and returns its exit code, as that of llama_mini.generate."""
    args = parser(prog).parse_args(argv)
    return exit_code_of(lambda: run(args))


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=prog,
        description="Perplexity of texts, under the conditions that it prints with it.",
    )
    p.add_argument(
        "files", nargs="*", metavar="TEXTFILE", help="UTF-8, each a text of its own; without one: standard input"
    )
    p.add_argument("--version", action="version", version=f"llama_mini {__version__}")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")

    model_options(p)

    windows = p.add_argument_group("windows")
    windows.add_argument(
        "--context", type=int, metavar="N", help="tokens of a window; default: the model's context, up to 2,048"
    )
    windows.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="a window begins every N tokens, and scores those that none before it held; default: the whole window",
    )
    windows.add_argument(
        "--bos",
        choices=["rule", "each", "none"],
        default="rule",
        help="rule (default): what the checkpoint puts before a text; each: BOS before every window; none",
    )

    against = p.add_argument_group("comparison", "With one of these, a second model is the reference, never quantised.")
    against.add_argument("--against", metavar="M", help="checkpoint of the reference; default: that of --model")
    against.add_argument("--against-dtype", metavar="D", help="its dtype; default: that of --dtype")
    return p


@dataclass(frozen=True)
class Input:
    """The texts as ids, and what stands before them: before each window if `window_bos` is an id."""

    ids: list[list[int]]
    window_bos: int | None
    bos: int | None


def run(args: argparse.Namespace) -> None:
    """Everything after the arguments are parsed. Raises LlamaMiniError."""
    texts = _read_texts(args.files)
    from llama_mini.engine.llm import LLM
    from llama_mini.eval.perplexity import compare, perplexity

    model = checkpoint_of(args.model)
    llm = LLM(model, args.dtype, args.device, args.quantize, args.kernels, args.threads)
    given = _encoded(texts, llm, args.bos)
    windows = (given.ids, args.context, args.stride, given.window_bos)
    facts = {"model": str(model), "format": _format(llm, args.quantize), "texts": args.files or ["standard input"]}
    if args.against is None and args.against_dtype is None:
        _print(facts, given, llm, perplexity(llm, *windows), None, args.json)
        return
    against = model if args.against is None else args.against
    reference = LLM(against, args.against_dtype or args.dtype, args.device, None, args.kernels, args.threads)
    comparison = compare(llm, reference, *windows)
    facts |= {"reference": str(against), "reference_format": _format(reference, None)}
    _print(facts, given, llm, comparison.model, comparison, args.json)


def _read_texts(files: list[str]) -> list[str]:
    texts = [_read_file(name) for name in files] if files else [read_standard_input("the text")]
    for name, text in zip(files or ["standard input"], texts, strict=True):
        if not text:
            raise RequestError(f"{name} is empty: there is nothing to score")
    return texts


def _read_file(name: str) -> str:
    try:
        return as_text(Path(name).read_bytes(), name)
    except OSError as error:
        raise RequestError(f"cannot read {name}: {error.strerror}") from None


def _encoded(texts: list[str], llm: "LLM", bos: str) -> Input:
    tokenizer = llm.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=bos == "rule") for text in texts]
    if bos == "each":
        if tokenizer.bos_id is None:
            raise RequestError("--bos each needs a BOS token, and this checkpoint names none: leave it out")
        return Input(ids, tokenizer.bos_id, tokenizer.bos_id)
    added = ids[0][0] == tokenizer.bos_id if ids[0] else False  # text alone never becomes BOS
    return Input(ids, None, tokenizer.bos_id if added else None)


def _format(llm: "LLM", quantize: str | None) -> str:
    from llama_mini.machine import dtype_name

    dtype = dtype_name(llm.model.dtype)
    return dtype if quantize is None else f"{quantize} weights, {dtype}"


def _print(
    facts: dict[str, Any],
    given: Input,
    llm: "LLM",
    result: "Perplexity",
    comparison: "Comparison | None",
    as_json: bool,
) -> None:
    where = "before each window" if given.window_bos is not None else "before each text"
    if as_json:
        figures = asdict(result) | {"perplexity": result.perplexity, "bos": given.bos}
        figures |= {"bos_place": None if given.bos is None else where}
        compared = {} if comparison is None else asdict(comparison)
        compared.pop("model", None)
        if comparison is not None:
            compared["reference"] = {"nll": comparison.reference.nll, "perplexity": comparison.reference.perplexity}
        print(json.dumps(_finite(facts | figures | ({"against": compared} if compared else {})), indent=2))
        return
    bos = "none"
    if given.bos is not None:
        bos = f"{given.bos} {llm.tokenizer.decode([given.bos], skip_special_tokens=False)}, {where}"
    rows = [
        ("model", f"{facts['model']}, {facts['format']}"),
        ("text", ", ".join(facts["texts"])),
        ("context", f"{result.context:,} tokens, a window every {result.stride:,}"),
        ("BOS", bos),
        ("tokens scored", f"{result.tokens:,} of {sum(map(len, given.ids)):,}"),
        ("mean NLL", f"{result.nll:.5f} nats"),
        ("perplexity", f"{result.perplexity:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.5f}"),
    ]
    rows += [] if comparison is None else _compared(facts, comparison)
    for name, value in rows:
        print(f"{name:16}{value}")
    sys.stdout.flush()


def _compared(facts: dict[str, Any], found: "Comparison") -> list[tuple[str, str]]:
    return [
        (
            "reference",
            f"{facts['reference']}, {facts['reference_format']}, perplexity {found.reference.perplexity:.4f}",
        ),
        ("KL(ref ‖ model)", f"mean {found.kl_mean:.6f}, median {found.kl_median:.6f} nats a token"),
        ("", f"99 % {found.kl_99:.6f}, maximum {found.kl_max:.6f}"),
        ("same top token", f"{found.top1:.2%}"),
        ("mean NLL − ref.", f"{found.nll_difference:+.6f} ± {found.nll_error:.6f} nats (standard error)"),
    ]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
