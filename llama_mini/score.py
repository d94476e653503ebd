"""Perplexity of texts on the command line: python -m llama_mini.score TEXTFILE

The figures go to standard output, everything else to standard error. torch is imported only when a model runs.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llama_mini import __version__
from llama_mini.cli.common import checkpoint_of, exit_code_of
from llama_mini.cli.options import adapters, model_options
from llama_mini.cli.parser import Parser
from llama_mini.cli.streams import read_file
from llama_mini.errors import RequestError

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.eval.perplexity import Comparison, Perplexity


PROG = "python -m llama_mini.score"


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command line; the exit codes are those of llama_mini.generate."""
    return exit_code_of(lambda: run(parser(prog).parse_args(argv)))


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = Parser(prog=prog, description="Prints the perplexity of texts and the conditions of the measurement.")
    texts = "UTF-8 files; no window spans two of them; default, and -: standard input"
    p.add_argument("files", nargs="*", metavar="TEXTFILE", help=texts)
    p.add_argument("--version", action="version", version=f"llama_mini {__version__}")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    model_options(p)
    add = p.add_argument_group("windows").add_argument
    add("--context", type=int, metavar="N", help="tokens per window; default: the model's context, at most 2,048")
    stride = "start a window every N tokens; it scores those that no earlier window had; default: a whole window"
    add("--stride", type=int, metavar="N", help=stride)
    bos = "rule (default): where the checkpoint's tokenizer adds it; each: before every window; none: nowhere"
    add("--bos", choices=["rule", "each", "none"], default="rule", help=bos)
    against = p.add_argument_group(
        "comparison", "Either adds a second model, the reference, neither quantised nor edited."
    )
    against.add_argument("--against", metavar="M", help="checkpoint of the reference; default: that of --model")
    against.add_argument("--against-dtype", metavar="D", help="dtype of the reference; default: that of --dtype")
    return p


@dataclass(frozen=True)
class Input:
    """The texts as token ids."""

    ids: list[list[int]]
    window_bos: int | None  # the BOS to put before each window
    bos: int | None  # the BOS in use: before each window, or at the start of `ids`


def run(args: argparse.Namespace) -> None:
    """Scores the texts and prints the figures. Raises LlamaMiniError."""
    texts = _read_texts(args.files)
    from llama_mini.engine.llm import LLM
    from llama_mini.eval.perplexity import compare, perplexity
    from llama_mini.lab.edits_file import edited_by

    merged = adapters(args)
    model = checkpoint_of(args.model, merged)
    llm = LLM(model, args.dtype, args.device, args.quantize, args.kernels, args.threads, merged)
    tokens = _encode(texts, llm, args.bos)
    windows = (tokens.ids, args.context, args.stride, tokens.window_bos)
    facts = {
        "model": " + ".join([str(model), *args.adapter]),
        "format": _format(llm) + (f", edited by {args.edit}" if args.edit is not None else ""),
        "texts": args.files or ["standard input"],
    }
    if args.against is None and args.against_dtype is None:
        with edited_by(llm, args.edit):
            scored = perplexity(llm, *windows)
        _print(facts, tokens, llm, scored, args.json)
        return
    against, also = (model, merged) if args.against is None else (args.against, None)
    reference = LLM(against, args.against_dtype or args.dtype, args.device, "none", args.kernels, args.threads, also)
    with edited_by(llm, args.edit):
        comparison = compare(llm, reference, *windows)
    facts |= {"reference": str(against), "reference_format": _format(reference)}
    _print(facts, tokens, llm, comparison, args.json)


def _read_texts(files: list[str]) -> list[str]:
    names = files or ["-"]
    if names.count("-") > 1:
        raise RequestError("standard input, -, is given twice, but can be read once: leave one of them out")
    texts = [read_file(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text:
            raise RequestError(f"{'standard input' if name == '-' else name} is empty: there is nothing to score")
    return texts


def _encode(texts: list[str], llm: "LLM", bos: str) -> Input:
    tokenizer = llm.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=bos == "rule") for text in texts]
    if bos == "each":
        if tokenizer.bos_id is None:
            raise RequestError("--bos each needs a BOS token, and this checkpoint has none: leave it out")
        return Input(ids, tokenizer.bos_id, tokenizer.bos_id)
    added = ids[0][0] == tokenizer.bos_id if ids[0] else False  # by the tokenizer, since no text encodes to BOS
    return Input(ids, None, tokenizer.bos_id if added else None)


def _format(llm: "LLM") -> str:
    from llama_mini.machine import dtype_name
    from llama_mini.optimize import quantized_formats

    formats, dtype = quantized_formats(llm.model), dtype_name(llm.model.dtype)
    return f"{' and '.join(formats)} weights, {dtype}" if formats else dtype


def _print(facts: dict[str, Any], tokens: Input, llm: "LLM", scored: "Perplexity | Comparison", as_json: bool) -> None:
    from llama_mini.eval.perplexity import Comparison

    comparison = scored if isinstance(scored, Comparison) else None
    result = scored.model if isinstance(scored, Comparison) else scored
    where = "before each window" if tokens.window_bos is not None else "before each text"
    if as_json:
        figures = asdict(result) | {"perplexity": result.perplexity, "bos": tokens.bos}
        figures |= {"bos_place": None if tokens.bos is None else where}
        if comparison is not None:
            reference = {"nll": comparison.reference.nll, "perplexity": comparison.reference.perplexity}
            figures["against"] = asdict(comparison) | {"reference": reference}
            del figures["against"]["model"]  # its figures are already in `figures`
        print(json.dumps(_finite(facts | figures), indent=2))
        return
    bos = "none"
    if tokens.bos is not None:
        bos = f"{tokens.bos} {llm.tokenizer.decode([tokens.bos], skip_special_tokens=False)}, {where}"
    rows = [
        ("model", f"{facts['model']}, {facts['format']}"),
        ("text", ", ".join(facts["texts"])),
        ("context", f"{result.context:,} tokens, a window every {result.stride:,}"),
        ("BOS", bos),
        ("tokens scored", f"{result.tokens:,} of {sum(map(len, tokens.ids)):,}"),
        ("mean NLL", f"{result.nll:.5f} nats"),
        ("perplexity", f"{result.perplexity:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.5f}"),
    ]
    if comparison is not None:
        of_reference = f"{facts['reference']}, {facts['reference_format']}"
        rows += [
            ("reference", f"{of_reference}, perplexity {comparison.reference.perplexity:.4f}"),
            ("KL(ref ‖ model)", f"mean {comparison.kl_mean:.6f}, median {comparison.kl_median:.6f} nats a token"),
            ("", f"99 % {comparison.kl_99:.6f}, maximum {comparison.kl_max:.6f}"),
            ("same top token", f"{comparison.top1:.2%}"),
            ("mean NLL − ref.", f"{comparison.nll_difference:+.6f} ± {comparison.nll_error:.6f} nats (standard error)"),
        ]
    for name, value in rows:
        print(f"{name:16}{value}")


def _finite(value: Any) -> Any:
    """NaN and infinity as None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
