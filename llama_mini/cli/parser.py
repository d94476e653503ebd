"""The parser of the commands: argparse, with the option names of other engines, and options anywhere on the line."""

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_OTHER_NAMES = {  # of llama.cpp, vLLM and transformers; --top_k and the like are read as --top-k
    "--model": "-m",
    "--adapter": "--lora --adapter-path",
    "--prompt": "-p",
    "--file": "-f",
    "--system": "-sys --system-prompt",
    "--max-tokens": "-n --predict --n-predict --max-new-tokens --max-completion-tokens",
    "--temperature": "--temp",
    "--repetition-penalty": "--repeat-penalty",
    "--seed": "-s",
    "--json-schema": "-j --json-schema-file -jf",
    "--grammar": "--grammar-file",
    "--threads": "-t",
    "--draft": "--model-draft -md --draft-model",
    "--served-model-name": "--alias -a",
    "--allowed-origin": "--allowed-origins",
}
ALIASES = {alias: option for option, aliases in _OTHER_NAMES.items() for alias in aliases.split()}


class Parser(argparse.ArgumentParser):
    """Also takes the names that other engines have for an option, and gives the nearest name for an unknown one."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:
            end = words.index("--") if "--" in words else len(words)
            options, others = self._sorted(words[:end])
            rest = words[end + 1 :]
            words = [*options, "--", *others, *rest] if rest else [*others, *options]
        parsed, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += ", after = if it begins with -, as in --stop=--x"
        super().error(message)

    def _sorted(self, words: list[str]) -> tuple[list[str], list[str]]:
        """The options by their names here, with their values; and the other words, which argparse wants side by side.

        A value that begins with - but is no option is joined to its option by =: argparse would take it for an option.
        """
        known: list[str] = []
        others: list[str] = []
        options, takes = self._option_string_actions, 0.0  # how many values may follow
        for word in words:
            name = self._known_name(word)
            is_option = name.partition("=")[0] in options or (word.startswith("--") and word[2:3].isalpha())
            if takes == 1 and known[-1] in options and word.startswith("-") and not is_option:
                known[-1] += f"={word}"
                takes = 0
            elif word.startswith("-") and word != "-":
                known.append(name)
                nargs = options[name].nargs if name in options else None  # one that is unknown may have a value
                takes = 0 if "=" in name else math.inf if nargs == "+" else int(nargs is None)
            elif takes:
                known.append(word)
                takes -= 1
            else:
                others.append(word)
        return known, others

    def _known_name(self, word: str) -> str:
        if not word.startswith("-") or len(word.split()) != 1:
            return word
        name, equals, value = word.partition("=")
        dashes = name.replace("_", "-") if name.startswith("--") else name
        options = self._option_string_actions
        if (known := ALIASES.get(dashes, dashes)) in options:
            return known + equals + value
        longer = [option for option in options if dashes.startswith("--") and option.startswith(dashes)]
        return (longer[0] if len(longer) == 1 else name) + equals + value

    def _hint(self, unknown: list[str]) -> str:
        name = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        if name is None:
            return ""
        known = [option for action in self._actions for option in action.option_strings]
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            return f" (did you mean {close[0]}?)"
        return "; a prompt that begins with - goes after --" if "--prompt" in known else ""
