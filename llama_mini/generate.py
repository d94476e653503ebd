"""The command line: python -m llama_mini.generate "..."

Text goes to standard output, all else to standard error. torch is imported only once there is something to run.
"""

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_mini import __version__
from llama_mini.collector import collector_off
from llama_mini.errors import LlamaMiniError, RequestError

if TYPE_CHECKING:
    from llama_mini.engine import LLM
    from llama_mini.request import Chunk, Completion, Stats
    from llama_mini.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 512
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 usage, 3 checkpoint, 4 capacity, 1 other, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        run(args)
    except LlamaMiniError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader left early: nothing more to say, to it or about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m llama_mini.generate",
        description="Answers PROMPT with a LLaMA-family model: text on standard output, all else on standard error.",
    )
    p.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="without it, standard input is read, less its last newline"
    )
    p.add_argument("--version", action="version", version=f"llama_mini {__version__}")

    model = p.add_argument_group("model")
    model.add_argument(
        "--model", metavar="M", help="directory, GGUF file or hub name; default: SmolLM2-135M-Instruct, fetched once"
    )
    model.add_argument("--info", action="store_true", help="print what the checkpoint is, without loading it, and end")
    model.add_argument(
        "--dtype", default="auto", metavar="D", help="auto (default), float32, bfloat16, float16, float64"
    )
    model.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    model.add_argument(
        "--quantize", choices=["int8", "int4"], metavar="Q", help="int8 or int4: weights of so many bits, made at load"
    )
    model.add_argument(
        "--kernels",
        choices=["auto", "off"],
        default="auto",
        help="auto (default) builds fast operators once, about 10 s; off uses PyTorch's own",
    )
    model.add_argument("--threads", type=int, metavar="N", help="processor threads; default: the cores it may use")

    text = p.add_argument_group("text")
    mode = text.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="chat; default where the checkpoint has a chat template")
    mode.add_argument("--raw", action="store_true", help="complete the prompt as it stands")
    text.add_argument("--system", metavar="TEXT", help="system message of the chat")
    text.add_argument("--max-tokens", type=int, metavar="N", help=f"new tokens at most; default: {DEFAULT_MAX_TOKENS}")
    text.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    text.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")

    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="F", help="0 (default) is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest; 0 (default): all")
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="F", help="keep the likeliest that reach F; default: 1"
    )
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="F", help="keep those F times as likely as the likeliest"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="same seed, same text; default: a new one each time")

    output = p.add_argument_group("output")
    output.add_argument("--no-stream", action="store_true", help="print the text at its end, not as it comes")
    output.add_argument(
        "--stats", action="store_true", help="print times, tokens per second and peak memory at the end"
    )
    return p


def run(args: argparse.Namespace) -> None:
    """Everything after the arguments are parsed. Raises LlamaMiniError."""
    if args.info:
        from llama_mini.info import describe

        print(describe(_checkpoint(args), args.dtype, args.device))
        return
    if args.raw and args.system is not None:
        raise RequestError("--system belongs to a chat and --raw completes text: leave one of them out")
    prompt = _read_prompt() if args.prompt is None else args.prompt
    if not prompt:
        raise RequestError("the prompt is empty: give PROMPT, or text on standard input")
    with collector_off():
        params = _params(args)
        llm = _load(args)
        gc.freeze()  # it stays: nothing to look through later
    ids = _tokens(llm, prompt, args)
    room = llm.config.max_seq_len - len(ids)
    if params.max_tokens is None and room > 0:
        params = replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, room))
    completion = _print_answer(llm.stream(ids, params), stream=not args.no_stream)
    if args.stats:
        print(_summary(completion.stats), file=sys.stderr)


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _params(args: argparse.Namespace) -> "SamplingParams":
    from llama_mini.sampling import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )


def _load(args: argparse.Namespace) -> "LLM":
    from llama_mini.checkpoint.open import open_checkpoint, resolve
    from llama_mini.checkpoint.source import n_parameters
    from llama_mini.dtypes import as_device, as_dtype
    from llama_mini.engine import LLM
    from llama_mini.memory import check_fits

    source = open_checkpoint(resolve(_checkpoint(args)))
    device = as_device(args.device)
    asked = min(args.max_tokens or DEFAULT_MAX_TOKENS, source.config.max_seq_len)
    check_fits(source.config, n_parameters(source), as_dtype(args.dtype, device), asked, device, quantize=args.quantize)
    return LLM(source, args.dtype, device, args.quantize, args.kernels, args.threads)


def _checkpoint(args: argparse.Namespace) -> str | Path:
    if args.model is not None:
        return str(args.model)
    from llama_mini.checkpoint.default import ensure_default_checkpoint

    return ensure_default_checkpoint()


def _tokens(llm: "LLM", prompt: str, args: argparse.Namespace) -> list[int]:
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
