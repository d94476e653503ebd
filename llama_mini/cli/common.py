"""What the commands share: exit codes, the default checkpoint, prompts as token ids, tables and statistics."""

import argparse
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_mini.cli.options import DEFAULT_MAX_TOKENS, template_variables
from llama_mini.cli.streams import standard_streams
from llama_mini.errors import LlamaMiniError, RequestError
from llama_mini.validate import join_names

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.engine.request import Stats
    from llama_mini.engine.sampling_params import SamplingParams

INTERRUPTED = 130


def exit_code_of(run: Callable[[], object]) -> int:
    """Runs a command and returns its exit code: 0, 2 usage, 3 checkpoint, 4 capacity, 1 other, 130 Ctrl-C.

    `run` parses the options too, so that --help has the same streams.
    """
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    with standard_streams():
        try:
            try:
                run()
            finally:
                sys.stdout.flush()  # a full disk shows here, not when the interpreter ends and nobody can tell
        except LlamaMiniError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # as in `... | head`: no message
            return 0
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            print(f"error: {LlamaMiniError(reason)}", file=sys.stderr)
            return LlamaMiniError.exit_code
    return 0


def checkpoint_of(model: str | None, adapters: Collection[str] = ()) -> str | Path:
    """What --model names, else the model of the first adapter, else the default one, downloaded the first time."""
    if model is not None:
        return model
    if adapters:
        from llama_mini.checkpoint.open import model_of_adapter  # imports torch

        return model_of_adapter(next(iter(adapters)))
    from llama_mini.cli.default_model import ensure_default_checkpoint

    return ensure_default_checkpoint()


def with_limit(llm: "LLM", ids: list[int], params: "SamplingParams") -> "SamplingParams":
    """The parameters with the command's default for max_tokens, limited to the free positions of the context."""
    free = llm.config.max_seq_len - len(ids)
    if params.max_tokens is not None or free <= 0:
        return params
    return replace(params, max_tokens=max(min(DEFAULT_MAX_TOKENS, free), params.min_tokens))


def token_ids(
    llm: "LLM",
    args: argparse.Namespace,
    prompt: Any,
    is_chat: bool | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """A text, token ids or the messages of a chat, as token ids.

    is_chat: whether `prompt` is messages (True) or plain text (False); None leaves a text to the options.
    variables: of the chat template; they win over --template-arg.

    Raises RequestError for an option or a variable that the prompt cannot take.
    """
    variables = template_variables(args) | dict(variables or {})
    is_ids = isinstance(prompt, list) and not is_chat
    of_a_chat = {'"messages"': is_chat, "--chat": args.chat, "--system": args.system is not None}
    given = [*(name for name, is_given in of_a_chat.items() if is_given), *variables]
    plain = {"--raw continues plain text": args.raw, "/v1/completions does not chat": is_chat is False}
    plain["token ids are a whole prompt"] = is_ids
    reason = next((reason for reason, holds in plain.items() if holds), None)
    if reason and given:
        raise RequestError(f"{join_names(given)} belongs to a chat, and {reason}: leave it out")
    if is_ids:
        return prompt
    if not is_chat:
        if reason or not (given or llm.tokenizer.has_chat_template):
            return llm.tokenizer.encode(prompt, parse_special=args.special)
        prompt = [{"role": "user", "content": prompt}]
    messages = prompt if isinstance(prompt, list) else []
    has_system = any(isinstance(message, dict) and message.get("role") == "system" for message in messages)
    if args.system is not None and messages and not has_system:
        prompt = [{"role": "system", "content": args.system}, *messages]
    return llm.tokenizer.apply_chat_template(prompt, **variables)


def table(rows: Mapping[str, str]) -> str:
    """A line for each row: its name, padded to the longest, and its value."""
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def summary(stats: "Stats") -> str:
    """The times of one answer. `prefill 21 of 65 tokens`: the others were in the cache."""
    prefilled = stats.prompt_tokens - stats.cached_tokens
    guessed = f", {stats.accepted_tokens} of {stats.proposed_tokens} guesses right" if stats.proposed_tokens else ""
    prompt = f"{prefilled} of {stats.prompt_tokens}" if stats.cached_tokens else f"{prefilled}"
    return (
        f"first token {_or_dash(stats.ttft_seconds, '.2f', 's')} · "
        f"prefill {prompt} tokens, {_or_dash(stats.prefill_tok_s, '.1f', 'tok/s')} · "
        f"decode {stats.new_tokens} tokens, {_or_dash(stats.decode_tok_s, '.1f', 'tok/s')}{guessed}"
    )


def _or_dash(value: float | None, digits: str, unit: str) -> str:
    return "–" if value is None else f"{value:{digits}} {unit}"
