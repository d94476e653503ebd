"""What the lab's commands read: the checkpoint, the text, and the settings of an edit."""

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.errors import CheckpointPathError, RequestError
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.tokenizer import open_tokenizer


def checkpoint(args: argparse.Namespace) -> Path:
    return resolve(args.checkpoint())


def read_model(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    source = open_checkpoint(checkpoint(args))
    return load_model(Llama, source, args.dtype, "cpu"), open_tokenizer(source)


def read_tokenizer(path: Path) -> Tokenizer:
    return open_tokenizer(open_checkpoint(path))


def read_ids(tokenizer: Tokenizer, args: argparse.Namespace) -> list[int]:
    """The first tokens of the text. Raises RequestError where there are too few."""
    if args.tokens < 2:
        raise RequestError(f"--tokens must be at least 2, not {args.tokens}")
    if args.text is None:
        text = files("llama_mini.lab").joinpath("text.txt").read_text(encoding="utf-8")
    else:
        try:
            text = args.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointPathError(f"cannot read {args.text}: {getattr(error, 'strerror', error)}") from None
    ids = tokenizer.encode(text)[: args.tokens]
    if len(ids) < 2:
        raise RequestError(f"{args.text} has {len(ids)} tokens; at least 2 are needed")
    return ids


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE words as the settings of an edit: numbers, true and false; gain=scale:2 multiplies."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise RequestError(f"an edit is written KEY=VALUE, such as eps=1e-3, not {pair!r:.80}")
        if key in settings:
            raise RequestError(f"{key!r:.80} is given twice")
        settings[key] = _value(value)
    return settings


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("scale:"):
        return ("scale", _value(text.removeprefix("scale:")))
    try:
        return float(text)
    except ValueError:
        return text
