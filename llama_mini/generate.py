"""The command `generate`: python -m llama_mini.generate "Why is the sky blue?"

The text goes to standard output, everything else to standard error. torch is imported only once there is something to
run.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from llama_mini.cli.common import checkpoint_of, exit_code_of, summary, token_ids, with_limit
from llama_mini.cli.options import DEFAULT_MAX_TOKENS, PROG, adapters, check, parser, sampling, template_variables
from llama_mini.cli.streams import read_file, read_standard_input, typed_text
from llama_mini.errors import RequestError

if TYPE_CHECKING:
    from llama_mini.checkpoint.source import Source
    from llama_mini.engine.llm import LLM
    from llama_mini.engine.sampling_params import SamplingParams


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command and returns its exit code: 0, 2 usage, 3 checkpoint, 4 capacity, 1 other, 130 Ctrl-C."""
    return exit_code_of(lambda: run(parser(prog).parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the parsed options ask for. Raises LlamaMiniError."""
    check(args)
    if args.system is not None:
        args.system = typed_text(args.system, "--system")
    if args.info:
        from llama_mini.cli.info import describe

        merged = adapters(args)
        print(describe(checkpoint_of(args.model, merged), args.dtype, args.device, merged))
    elif args.interactive:
        from llama_mini.cli import chat

        with _loaded(args) as (llm, params, _):
            chat.run(llm, params, args.system, template_variables(args))
    elif args.batch is not None:
        from llama_mini.cli.batch import open_batch, settings_of

        with open_batch(args.batch, args.output) as batch, _loaded(args) as (llm, params, source):
            batch.answer(llm, params, args, settings_of(args, llm, source))
    else:
        _answer(args)


def _prompt(args: argparse.Namespace) -> str:
    typed = args.prompt if args.prompt_option is None else args.prompt_option
    if typed not in (None, "-"):
        return typed_text(typed, "the prompt")
    text = read_standard_input("the prompt") if args.file is None else read_file(args.file)
    return text.removesuffix("\n").removesuffix("\r")


def _answer(args: argparse.Namespace) -> None:
    prompt = _prompt(args)
    if not prompt:
        raise RequestError("the prompt is empty: give PROMPT, or text on standard input")
    streamed = not (args.json or args.no_stream)
    with _loaded(args) as (llm, params, _):
        ids = token_ids(llm, args, prompt)
        for chunk in llm.stream(ids, with_limit(llm, ids, params)):
            if streamed:
                print(chunk.text, end="", flush=True)
    completion = chunk.completion
    assert completion is not None
    if args.json:
        from llama_mini.cli.batch import as_json

        print(json.dumps(as_json(completion), ensure_ascii=False))
    else:
        end = "" if completion.text.endswith("\n") else "\n"
        print("" if streamed else completion.text, end=end, flush=True)
    if args.stats:
        stats = completion.stats
        peak = "–" if stats.peak_memory_bytes is None else f"{stats.peak_memory_bytes / 2**20:.0f} MiB"
        print(f"load {stats.load_seconds:.2f} s · {summary(stats)} · peak memory {peak}", file=sys.stderr)


@contextmanager
def _loaded(args: argparse.Namespace) -> "Iterator[tuple[LLM, SamplingParams, Source]]":
    """What `_load` returns, with the edits of --edit."""
    loaded = _load(args)
    if args.edit is None:
        yield loaded
        return
    from llama_mini.lab.edits_file import edited_by

    with edited_by(loaded[0], args.edit):
        yield loaded


def _load(args: argparse.Namespace) -> "tuple[LLM, SamplingParams, Source]":
    """The model, the parameters and the checkpoint.

    Wrong options and a model that does not fit are refused before weights are read.
    """
    gc.disable()  # importing torch and loading make many long-lived objects; scanning them for garbage takes 0.1 s
    try:
        params = sampling(args)
        from llama_mini.checkpoint.open import open_checkpoint, resolve
        from llama_mini.checkpoint.weight_formats import quantize_for, weight_bytes
        from llama_mini.engine.llm import LLM
        from llama_mini.machine import as_device, as_dtype
        from llama_mini.memory import cache_dtype, check_fits
        from llama_mini.optimize.build import expects_kernels

        merged = adapters(args)
        source = open_checkpoint(resolve(checkpoint_of(args.model, merged)), adapter=merged)
        config, device = source.config, as_device(args.device)
        # LLM checks that one position of cache fits. The command knows how many it needs.
        positions = min(args.max_tokens or DEFAULT_MAX_TOKENS, config.max_seq_len)
        quantize = quantize_for(source, args.quantize, args.dtype, device)
        dtype = as_dtype(args.dtype, device, expects_kernels(args.kernels))
        weights, of_cache = partial(weight_bytes, source), cache_dtype(args.kv_dtype)
        check_fits(config, weights, dtype, positions, device, quantize=quantize, kv_dtype=of_cache)
        engine = {"draft": args.draft, "speculation": args.speculation, "kv_dtype": args.kv_dtype}
        llm = LLM(source, args.dtype, device, args.quantize, args.kernels, args.threads, **engine)
        gc.freeze()
    finally:
        gc.enable()
    return llm, params, source


if __name__ == "__main__":
    sys.exit(main())
