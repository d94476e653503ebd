"""Addresses of norm slots, and patterns that pick them.

A pattern is a module path split at dots; each segment is a name, an fnmatch pattern (`*`, `?`, `[..]`) or a range
`a-b`: `layers.0-3.*.pre_norm`. `*` stays within its segment.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from llama_mini.errors import RequestError
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.validate import join_names, short_repr

_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")


def slots(model: Llama) -> dict[str, nn.Module]:
    """Every norm slot by its path, in the order of the forward pass: a norm, or nn.Identity where the plan has none."""
    branch = {
        "attention": ("pre_norm", "q_norm", "k_norm", "v_norm", "mid_norm", "out_norm", "post_norm"),
        "feed_forward": ("pre_norm", "mid_norm", "out_norm", "post_norm"),
    }
    paths = ["embed_norm"]
    paths += [
        f"layers.{i}.{name}.{slot}"
        for i in range(len(model.layers))
        for name, found in branch.items()
        for slot in found
    ]
    return {path: model.get_submodule(path) for path in [*paths, "norm"]}


def select(model: Llama, pattern: str | Sequence[str] | None, empty: bool = False) -> list[str]:
    """The paths that a pattern, or any of several, matches, in the order of the forward pass; None: every norm.

    Those of empty slots only if asked for. Raises RequestError where a pattern matches nothing.
    """
    known = slots(model)
    filled = [path for path, module in known.items() if isinstance(module, Norm)]
    if pattern is None:
        return list(known) if empty else filled
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise RequestError(f"a pattern of norms is text, or a list of texts, not {short_repr(pattern)}")
    found: set[str] = set()
    for one in patterns:
        matched = [path for path in known if _matches(path, one)]
        if not matched:
            raise RequestError(f"{short_repr(one)} matches no norm; there are {join_names(filled) or 'none'}")
        chosen = matched if empty else [path for path in matched if path in filled]
        if not chosen:
            raise RequestError(
                f"{short_repr(one)} matches empty slots alone: {join_names(matched)}; give a kind to fill them"
            )
        found.update(chosen)
    return [path for path in known if path in found]


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(_segment_matches, parts, wanted))


def _segment_matches(part: str, wanted: str) -> bool:
    if span := _RANGE.fullmatch(wanted):
        return part.isdigit() and int(span[1]) <= int(part) <= int(span[2])
    return fnmatchcase(part, wanted)
