"""The options of python -m llama_mini.generate, and what they say about sampling."""

import argparse
from typing import TYPE_CHECKING

from llama_mini import __version__
from llama_mini.errors import RequestError

if TYPE_CHECKING:
    from llama_mini.engine.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 512


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m llama_mini.generate",
        description="Answers PROMPT with a LLaMA-family model: text on standard output, all else on standard error.",
    )
    add = p.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="without it, standard input is read, less its last newline")
    add("--interactive", action="store_true", help="chat at the terminal; /help there lists its commands")
    add("--batch", metavar="FILE", help='a JSON object a line, with "prompt" or "messages"; goes on after a kill')
    add("--output", metavar="FILE", help="results of --batch, a JSON object a line; default: FILE.results.jsonl")
    add("--info", action="store_true", help="print what the checkpoint is, without loading it, and end")
    add("--version", action="version", version=f"llama_mini {__version__}")

    model_options(p)

    text = p.add_argument_group("text")
    mode = text.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="chat; default where the checkpoint has a chat template")
    mode.add_argument("--raw", action="store_true", help="complete the prompt as it stands")
    add = text.add_argument
    add("--system", metavar="TEXT", help="system message of the chat")
    add("--max-tokens", type=int, metavar="N", help=f"new tokens at most; default: {DEFAULT_MAX_TOKENS}")
    add("--min-tokens", type=int, default=0, metavar="N", help="new tokens before the text may end")
    add("--max-time", type=float, metavar="S", help="seconds after which the text is cut")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--stop-token", action="append", default=[], type=int, metavar="ID", help="end at this token; may be repeated")
    add("--ignore-eos", action="store_true", help="go on past the end-of-text token")

    add = p.add_argument_group("sampling", "in the order in which they act").add_argument
    add("--logit-bias", action="append", default=[], metavar="ID=F", help="add F to a token's logit; -inf bans it")
    add("--repetition-penalty", type=float, default=1.0, metavar="F", help="above 1: less of what prompt and text hold")
    add("--presence-penalty", type=float, default=0.0, metavar="F", help="off the logits of tokens in the new text")
    add("--frequency-penalty", type=float, default=0.0, metavar="F", help="the same for each time they occur")
    add("--temperature", type=float, default=0.0, metavar="F", help="0 (default) is greedy")
    add("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest; 0 (default): all")
    add("--top-p", type=float, default=1.0, metavar="F", help="keep the likeliest that reach F; default: 1")
    add("--min-p", type=float, default=0.0, metavar="F", help="keep those F times as likely as the likeliest")
    add("--seed", type=int, metavar="N", help="same seed, same text; default: a new one each time")

    add = p.add_argument_group("output").add_argument
    add("--no-stream", action="store_true", help="print the text at its end, not as it comes")
    add("--stats", action="store_true", help="print times, tokens per second and peak memory at the end")
    add("--json", action="store_true", help="print one JSON object: text, ids, log-probabilities, statistics")
    add("--top-logprobs", type=int, default=0, metavar="N", help="with --json: the N likeliest tokens of each step too")
    add("--prompt-logprobs", action="store_true", help="with --json: the log-probabilities of the prompt too")
    return p


def model_options(p: argparse.ArgumentParser) -> None:
    """Which model, in what form, on what."""
    add = p.add_argument_group("model").add_argument
    add("--model", metavar="M", help="directory, GGUF file or hub name; default: SmolLM2-135M-Instruct, fetched once")
    add("--dtype", default="auto", metavar="D", help="auto (default), float32, bfloat16, float16, float64")
    add("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    add("--quantize", choices=["int8", "int4"], metavar="Q", help="int8 or int4: weights of so many bits, made at load")
    add(
        "--kernels",
        choices=["auto", "off"],
        default="auto",
        help="auto (default) builds fast operators once, about 10 s; off uses PyTorch's own",
    )
    add("--threads", type=int, metavar="N", help="processor threads; default: the cores it may use")


def check(args: argparse.Namespace) -> None:
    """Refuses options that have nothing to say beside each other."""
    given = {
        "PROMPT": args.prompt is not None,
        "--raw": args.raw,
        "--no-stream": args.no_stream,
        "--stats": args.stats,
        "--json": args.json,
        "--info": args.info,
        "--batch": args.batch is not None,
        "--interactive": args.interactive,
    }
    apart = {"--interactive": list(given), "--batch": ["PROMPT", "--no-stream", "--stats", "--json", "--info"]}
    for option, others in apart.items():
        if given[option] and (found := [other for other in others if given[other] and other != option]):
            raise RequestError(f"{option} and {found[0]} cannot go together: leave one of them out")
    if args.raw and args.system is not None:
        raise RequestError("--system belongs to a chat and --raw completes text: leave one of them out")
    if args.output is not None and args.batch is None:
        raise RequestError("--output is where the results of --batch go: give --batch, or leave it out")
    if (args.top_logprobs or args.prompt_logprobs) and not (args.json or args.batch):
        raise RequestError("--top-logprobs and --prompt-logprobs are shown by --json: give it too, or leave them out")


def sampling(args: argparse.Namespace) -> "SamplingParams":
    """The options as parameters. Raises RequestError."""
    from llama_mini.engine.sampling_params import SamplingParams

    names = (
        "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty seed min_tokens "
        "max_tokens max_time stop ignore_eos top_logprobs prompt_logprobs"
    )
    settings = {name: getattr(args, name) for name in names.split()}
    biases = dict(map(_bias, args.logit_bias)) or None
    return SamplingParams(**settings, logit_bias=biases, stop_token_ids=args.stop_token)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise RequestError(f"--logit-bias must be ID=F, a token id and a number, not {text!r}") from None
