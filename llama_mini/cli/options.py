"""The options of the commands. Nothing here imports torch, so that --help does not wait for it."""

import argparse
import json
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_mini import __version__
from llama_mini.cli.parser import Parser
from llama_mini.cli.streams import read_file, typed_text
from llama_mini.errors import RequestError
from llama_mini.validate import as_dict, short_repr

if TYPE_CHECKING:
    from llama_mini.engine.sampling_params import SamplingParams

PROG = "python -m llama_mini.generate"
DEFAULT_MAX_TOKENS = 512
SET_BY_THE_COMMAND = ("self", "messages", "add_generation_prompt")  # among the variables of a chat template
MODEL = "directory, GGUF file or hub name; default: SmolLM2-135M-Instruct, downloaded once"
_WORDS = {"true": True, "false": False, "none": None}


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = Parser(
        prog=prog,
        usage="%(prog)s [options] [PROMPT]",
        description="Answers PROMPT with a LLaMA-family model. The text goes to standard output, everything else to "
        "standard error.",
        epilog="Names of other engines work too: -m -p -f -n -t -s -sys --temp --top_k --max-new-tokens ...",
    )
    add = p.add_mutually_exclusive_group().add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="default, and -: all of standard input, without its last newline")
    add("--prompt", dest="prompt_option", metavar="TEXT", help="the prompt, also one that begins with -")
    add("--file", metavar="FILE", help="read the prompt from FILE, without its last newline")
    add("--interactive", action="store_true", help="chat at the terminal; /help there lists the commands")
    add("--batch", metavar="FILE", help="answer the prompts in JSON lines, - is standard input; run again to resume")
    add("--info", action="store_true", help="describe the checkpoint without loading its weights, and exit")
    add = p.add_argument
    add("--output", metavar="FILE", help="results of --batch, - is standard output; default: FILE.results.jsonl")
    add("--version", action="version", version=f"llama_mini {__version__}", help="print the version and exit")
    engine_options(model_options(p))
    text = p.add_argument_group("text")
    mode = text.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="answer as a chat; default if there is a chat template")
    mode.add_argument("--raw", action="store_true", help="continue the prompt as plain text")
    text.add_argument("--special", action="store_true", help="with --raw: names of special tokens in it become tokens")
    _text_options(text, f"at most N new tokens; default: {DEFAULT_MAX_TOKENS}")
    _sampling_options(p)
    _structure_options(p)
    add = p.add_argument_group("output").add_argument
    add("--no-stream", action="store_true", help="print the text when it is complete, not token by token")
    add("--stats", action="store_true", help="print times, tokens per second and peak memory afterwards")
    add("--json", action="store_true", help="print one JSON object: text, tokens, logprobs, statistics")
    add("--top-logprobs", type=int, default=0, metavar="N", help="with --json, --batch: the N likeliest of each step")
    add("--prompt-logprobs", action="store_true", help="with --json, --batch: log-probabilities of the prompt too")
    return p


def chat_parser(prog: str) -> argparse.ArgumentParser:
    """The options of `chat`, parsed into a namespace with the defaults of `generate --interactive`."""
    description = "Chats at the terminal; /help there lists the commands."
    p = Parser(prog=prog, usage="%(prog)s [options]", description=description)
    engine_options(model_options(p))
    _text_options(p.add_argument_group("text"), "at most N tokens an answer; default: to the end of the context")
    _sampling_options(p)
    _structure_options(p)
    return p


def info_parser(prog: str) -> argparse.ArgumentParser:
    """The options of `info`, parsed into a namespace with the defaults of `generate --info`."""
    p = Parser(prog=prog, description="Describes a checkpoint without loading its weights.")
    p.add_argument("model", nargs="?", metavar="MODEL", help=MODEL)
    _adapter(p)
    _dtype_and_device(p.add_argument_group("memory", "for the estimate of memory"))
    return p


def convert_parser(prog: str) -> argparse.ArgumentParser:
    p = Parser(
        prog=prog,
        description="Converts a checkpoint of any format to a Hugging Face directory, which llama_mini and "
        "transformers open as it is. From pickles (*.pth, *.bin) it reads only plain tensors.",
    )
    p.add_argument("source", metavar="SRC", help="a directory, a file or a hub name")
    p.add_argument("target", metavar="DST", type=Path, help="the directory to write, new or empty")
    p.add_argument("--dtype", metavar="D", help="float32, bfloat16 or float16; default: that of the weights")
    _adapter(p)
    return p


def model_options(p: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Which model, in which number format, on which device."""
    group = p.add_argument_group("model")
    group.add_argument("--model", metavar="M", help=MODEL)
    _adapter(group)
    _dtype_and_device(group)
    add = group.add_argument
    add("--edit", metavar="FILE", help="change norms: a JSON object {pattern: settings}, as for lab.edit")
    quantize = "auto (default): keep the bits of a quantised file, unless --dtype is given; none: make them floats; "
    quantize += "int8 or int4: quantise the weights while loading"
    add("--quantize", choices=["auto", "none", "int8", "int4"], default="auto", metavar="Q", help=quantize)
    kernels = "auto (default): fast operators, built once; off: PyTorch's"
    add("--kernels", choices=["auto", "off"], default="auto", help=kernels)
    add("--threads", type=int, metavar="N", help="CPU threads; default: OMP_NUM_THREADS, else one per usable core")
    return group


def engine_options(group: "argparse._ActionsContainer") -> None:
    add = group.add_argument
    kv_dtype = "auto (default): keys and values in the model's dtype; int8: in 8 bits, half of bfloat16"
    add("--kv-dtype", choices=["auto", "int8"], default="auto", help=kv_dtype)
    add("--draft", metavar="M", help="a smaller model of the same vocabulary, which guesses tokens; answers stay")
    auto = "auto (default): guess tokens, by --draft or earlier text, where that pays; answers stay; off: no guesses"
    add("--speculation", choices=["auto", "off"], default="auto", help=auto)


def _adapter(group: "argparse._ActionsContainer") -> None:
    what = "merge a LoRA adapter of PEFT or mlx-lm: directory or hub name, F times (default 1); may be repeated"
    group.add_argument("--adapter", action="append", default=[], metavar="A[=F]", help=what)


def _dtype_and_device(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--dtype", default="auto", metavar="D", help="auto (default), float32, bfloat16, float16, float64")
    add("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")


def _text_options(group: "argparse._ArgumentGroup", max_tokens: str) -> None:
    add = group.add_argument
    add("--system", metavar="TEXT", help="system message of the chat")
    variable = "a variable of the chat template, such as tools=[...] or enable_thinking=false; what is no JSON is text"
    add("--template-arg", action="append", default=[], metavar="NAME=JSON", help=variable)
    add("--max-tokens", type=int, metavar="N", help=max_tokens)
    add("--min-tokens", type=int, default=0, metavar="N", help="do not end before N new tokens")
    add("--max-time", type=float, metavar="S", help="end after S seconds")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--stop-token", action="append", default=[], type=int, metavar="ID", help="end at this token; may be repeated")
    add("--ignore-eos", action="store_true", help="continue after the end-of-text token")


def _sampling_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("sampling", "applied in this order").add_argument
    add("--logit-bias", action="append", default=[], metavar="ID=F", help="add F to a token's logit; -inf bans it")
    add("--repetition-penalty", type=float, default=1.0, metavar="F", help="above 1: repeat prompt and answer less")
    add("--presence-penalty", type=float, default=0.0, metavar="F", help="subtract F from logits of answer tokens")
    add("--frequency-penalty", type=float, default=0.0, metavar="F", help="the same, once for each time a token occurs")
    add("--temperature", type=float, default=0.0, metavar="F", help="default 0: the likeliest token (greedy)")
    add("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest tokens; default 0: all")
    add("--top-p", type=float, default=1.0, metavar="F", help="keep the likeliest tokens that sum to F; default 1: all")
    add("--min-p", type=float, default=0.0, metavar="F", help="keep tokens at least F times as likely as the likeliest")
    add("--seed", type=int, metavar="N", help="same seed, same text; default: a new one for each run")


def _structure_options(p: argparse.ArgumentParser) -> None:
    """Their values are read here, so that a batch that is resumed notices if a file has changed."""
    add = p.add_argument_group("structure of the answer", "at most one of these").add_argument
    schema = "JSON that matches a JSON schema: the schema itself, or a file"
    add("--json-schema", type=_schema, metavar="JSON|FILE", help=schema)
    regex = "text that matches a regular expression as a whole"
    add("--regex", type=partial(typed_text, name="--regex"), metavar="R", help=regex)
    add("--grammar", type=read_file, metavar="FILE", help="text of a grammar in Lark's or llama.cpp's syntax")
    choice = partial(typed_text, name="--choice")
    add("--choice", action="append", type=choice, metavar="TEXT", help="one of these texts; may be repeated")


def _schema(text: str) -> str:
    return typed_text(text, "--json-schema") if text.lstrip().startswith("{") else read_file(text)


def check(args: argparse.Namespace) -> None:
    """Refuses options of `generate` that contradict each other. Raises RequestError."""
    one_prompt = {"--no-stream": args.no_stream, "--stats": args.stats, "--json": args.json}
    for mode, given, others in (
        ("--info", args.info, {"--edit": args.edit is not None}),
        ("--interactive", args.interactive, one_prompt | {"--raw": args.raw}),
        ("--batch", args.batch is not None, one_prompt),
    ):
        if given and (conflicts := [other for other, is_given in others.items() if is_given]):
            raise RequestError(f"{mode} and {conflicts[0]} cannot be used together: leave one of them out")
    for option, value in (("--system", args.system), ("--template-arg", args.template_arg or None)):
        if args.raw and value is not None:
            raise RequestError(f"{option} belongs to a chat, --raw continues plain text: leave one of them out")
    if args.special and not args.raw:
        raise RequestError("--special is for plain text: give --raw too; a chat template writes its special tokens")
    if args.output is not None and args.batch is None:
        raise RequestError("--output takes the results of --batch: give --batch too, or leave it out")
    if (args.top_logprobs or args.prompt_logprobs) and not (args.json or args.batch):
        raise RequestError("--top-logprobs and --prompt-logprobs need --json or --batch: give one of them")
    if args.prompt is not None and is_checkpoint(args.prompt):
        raise RequestError(f"PROMPT is the path of a model: give --model {args.prompt}; to ask about it, use --prompt")


def is_checkpoint(word: str) -> bool:
    """Whether a word that should be a prompt is the path of a model."""
    path = Path(word)
    try:
        return (path.is_file() and path.suffix in (".gguf", ".safetensors")) or (path / "config.json").is_file()
    except (OSError, ValueError):  # a long text, or one with a zero byte, is no path
        return False


def sampling(args: argparse.Namespace) -> "SamplingParams":
    """The options as parameters. Raises RequestError."""
    from llama_mini.engine.sampling_params import SamplingParams

    settings = {field.name: getattr(args, field.name) for field in fields(SamplingParams) if field.name in args}
    settings |= {"stop_token_ids": args.stop_token}
    settings["logit_bias"] = as_dict("--logit-bias", map(_bias, args.logit_bias), RequestError) or None
    settings["stop"] = [typed_text(text, "--stop") for text in args.stop]
    return SamplingParams(**settings)


def adapters(args: argparse.Namespace) -> dict[str, float]:
    """The adapters of --adapter with their weights. Raises RequestError."""
    pairs = []
    for text in args.adapter:
        name, _, weight = text.rpartition("=")
        try:
            pairs.append((text, 1.0) if not name or Path(text).exists() else (name, float(weight)))
        except (OSError, ValueError):  # no number, so it is a part of the name
            pairs.append((text, 1.0))
    return as_dict("--adapter", pairs, RequestError)


def template_variables(args: argparse.Namespace) -> dict[str, Any]:
    """The variables of --template-arg. Raises RequestError."""
    variables = []
    for text in args.template_arg:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise RequestError(f"--template-arg must be NAME=JSON, not {short_repr(text)}")
        if name in SET_BY_THE_COMMAND:
            raise RequestError(f"--template-arg {name} is not a variable of the template, but set by the command")
        variables.append((name, json_or_text(value)))
    return as_dict("--template-arg", variables, RequestError)


def json_or_text(text: str) -> Any:
    """JSON, or a flag, none or number as Python writes it (False, None, .5); what is none of these stays text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for parse in (checked_json, float):
        with suppress(RecursionError, ValueError):
            return parse(text)
    return text


def checked_json(text: str, what: str = "the JSON") -> Any:
    """A JSON value. Raises ValueError, and RequestError for a name that an object gives twice."""
    return json.loads(text, object_pairs_hook=lambda pairs: as_dict(what, pairs, RequestError))


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise RequestError(f"--logit-bias must be ID=F, a token id and a number, not {text!r}") from None
