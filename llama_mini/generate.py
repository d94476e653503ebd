"""The command line: python -m llama_mini.generate "..."

Text goes to standard output, all else to standard error. torch is imported only once there is something to run.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_mini.cli.common import checkpoint_of, exit_code_of, read_standard_input
from llama_mini.cli.options import DEFAULT_MAX_TOKENS, PROG, check, parser, sampling
from llama_mini.errors import RequestError

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.engine.request import Chunk, Completion, Stats
    from llama_mini.engine.sampling_params import SamplingParams


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command line and returns its exit code: 0, 2 usage, 3 checkpoint, 4 capacity, 1 other, 130 Ctrl-C."""
    args = parser(prog).parse_args(argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Everything after the arguments are parsed. Raises LlamaMiniError."""
    check(args)
    if args.info:
        from llama_mini.cli.info import describe

        print(describe(checkpoint_of(args.model), args.dtype, args.device))
    elif args.interactive:
        from llama_mini.cli import chat

        params, llm = _params_and_model(args)
        chat.run(llm, params, args.system)
    elif args.batch is not None:
        from llama_mini.cli.batch import read_lines, run_batch

        lines = read_lines(Path(args.batch))
        params, llm = _params_and_model(args)
        results = Path(f"{args.batch}.results.jsonl" if args.output is None else args.output)
        run_batch(llm, lines, results, params, lambda llm, text: _tokens(llm, text, args), _limited)
    else:
        _answer(args)


def _answer(args: argparse.Namespace) -> None:
    prompt = args.prompt
    if prompt is None:
        prompt = read_standard_input("the prompt").removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise RequestError("the prompt is empty: give PROMPT, or text on standard input")
    params, llm = _params_and_model(args)
    ids = _tokens(llm, prompt, args)
    chunks = llm.stream(ids, _limited(llm, ids, params))
    if args.json:
        from llama_mini.cli.batch import as_json

        print(json.dumps(as_json(_completion(chunks)), ensure_ascii=False))
        return
    completion = _print_answer(chunks, stream=not args.no_stream)
    if args.stats:
        print(_summary(completion.stats), file=sys.stderr)


def _params_and_model(args: argparse.Namespace) -> "tuple[SamplingParams, LLM]":
    params = sampling(args)  # a wrong option is refused before the load
    gc.disable()  # importing torch and reading a model make much that stays: collecting meanwhile takes 0.1 s
    try:
        llm = _load(args)
        gc.freeze()
    finally:
        gc.enable()
    return params, llm


def _limited(llm: "LLM", ids: list[int], params: "SamplingParams") -> "SamplingParams":
    """The default of max_tokens, or all that the context leaves."""
    room = llm.config.max_seq_len - len(ids)
    if params.max_tokens is not None or room <= 0:
        return params
    return replace(params, max_tokens=max(min(DEFAULT_MAX_TOKENS, room), params.min_tokens))


def _load(args: argparse.Namespace) -> "LLM":
    from llama_mini.checkpoint.open import open_checkpoint, resolve
    from llama_mini.checkpoint.source import n_parameters
    from llama_mini.engine.llm import LLM
    from llama_mini.machine import as_device, as_dtype
    from llama_mini.memory import check_fits

    source = open_checkpoint(resolve(checkpoint_of(args.model)))
    device = as_device(args.device)
    asked = min(args.max_tokens or DEFAULT_MAX_TOKENS, source.config.max_seq_len)
    check_fits(source.config, n_parameters(source), as_dtype(args.dtype, device), asked, device, quantize=args.quantize)
    return LLM(source, args.dtype, device, args.quantize, args.kernels, args.threads)


def _tokens(llm: "LLM", prompt: Any, args: argparse.Namespace) -> list[int]:
    """A text, or the messages of a chat, as token ids."""
    if isinstance(prompt, list):
        return llm.tokenizer.apply_chat_template(prompt)
    if args.raw or not (args.chat or args.system is not None or llm.tokenizer.has_chat_template):
        return llm.tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return llm.tokenizer.apply_chat_template(messages)


def _print_answer(chunks: Iterable["Chunk"], stream: bool) -> "Completion":
    """Writes the text as it comes, or at its end; closes it with a newline if it has none."""
    held: list[str] = []
    for chunk in chunks:
        held.append(chunk.text)
        if stream or chunk.completion is not None:
            sys.stdout.write("".join(held))
            sys.stdout.flush()
            held.clear()
    assert chunk.completion is not None
    if not chunk.completion.text.endswith("\n"):
        print(flush=True)
    return chunk.completion


def _completion(chunks: Iterable["Chunk"]) -> "Completion":
    *_, last = chunks
    assert last.completion is not None
    return last.completion


def _summary(stats: "Stats") -> str:
    def rate(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f} tok/s"

    peak = "–" if stats.peak_memory_bytes is None else f"{stats.peak_memory_bytes / 2**20:.0f} MiB"
    ttft = "–" if stats.ttft_seconds is None else f"{stats.ttft_seconds:.2f} s"
    return (
        f"load {stats.load_seconds:.2f} s · first token {ttft} · "
        f"prefill {stats.prompt_tokens} tokens, {rate(stats.prefill_tok_s)} · "
        f"decode {stats.new_tokens} tokens, {rate(stats.decode_tok_s)} · peak memory {peak}"
    )


if __name__ == "__main__":
    sys.exit(main())
