"""Paths of norm slots, patterns that select them, and the matrices that read each slot.

A pattern is a module path split at its dots, such as `layers.0-3.*.pre_norm`. Each part is a name, an fnmatch pattern
(`*`, `?`, `[..]`) or a range `a-b`. `*` does not match across dots. A comma separates patterns: `layers.0.*.*,norm`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from llama_mini.errors import RequestError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_plan import BRANCHES
from llama_mini.model.norm_slots import HEAD_SLOTS, ONLY_IN, SLOTS
from llama_mini.validate import join_names, short_repr

READERS = {  # the only matrices that read the output of a norm inside a layer
    "attention.pre_norm": ("q_proj", "k_proj", "v_proj"),
    "attention.mid_norm": ("o_proj",),
    "feed_forward.pre_norm": ("gate_proj", "up_proj"),
    "feed_forward.mid_norm": ("down_proj",),
}
_COMMA = re.compile(r",(?![^\[]*\])")  # but those inside [..]
_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")


def slots(model: Llama) -> dict[str, nn.Module]:
    """Every norm slot by its path, in the order of the forward pass: a norm, or nn.Identity where the plan has none."""
    in_layers = [
        f"layers.{i}.{branch}.{slot}_norm"
        for i in range(len(model.layers))
        for branch in BRANCHES
        for slot in SLOTS
        if ONLY_IN.get(slot, branch) == branch and (slot != "gate" or model.config.gated_mlp)
    ]
    return {path: model.get_submodule(path) for path in ["embed_norm", *in_layers, "norm"]}


def layer_of(name: str, depth: int) -> int:
    """The layer of a norm or parameter: `depth` for the final norm, -1 for embedding and head."""
    top, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if top == "layers" else depth if top == "norm" else -1


def slot_width(config: LlamaConfig, path: str) -> int:
    """The width of a norm at `path`. A q, k or v norm is assumed to see each head by itself."""
    branch, _, slot = path.rpartition(".")
    if slot.removesuffix("_norm") in HEAD_SLOTS:
        return config.head_dim
    if slot not in ("gate_norm", "up_norm", "mid_norm"):
        return config.dim
    return config.n_heads * config.head_dim if branch.endswith("attention") else config.hidden_dim


def readers(path: str, config: LlamaConfig) -> list[str]:
    """The names of the weights that read a norm's output; none if anything else reads it too."""
    if path == "norm":
        return ["tok_embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"]
    branch, _, slot = path.rpartition(".")
    layer, _, name = branch.rpartition(".")
    names = [f"{branch}.{reader}.weight" for reader in READERS.get(f"{name}.{slot}", ())]
    if config.norm_plan.parallel and (name, slot) == ("attention", "pre_norm"):  # both branches read it
        if config.norm_plan.layer(int(layer.split(".")[1]))[1].pre is not None:
            return []
        names += readers(f"{layer}.feed_forward.pre_norm", config)
    return [reader for reader in names if config.gated_mlp or ".gate_proj." not in reader]


def select(model: Llama, pattern: str | Sequence[str] | None, empty: bool = False) -> list[str]:
    """The paths that match a pattern, or any of several, in the order of the forward pass; None: every norm.

    empty: also return slots that hold no norm. Raises RequestError for a pattern that matches nothing.
    """
    known = slots(model)
    filled = [path for path, module in known.items() if isinstance(module, Norm)]
    if pattern is None:
        return list(known) if empty else filled
    selected: set[str] = set()
    for one in split(pattern):
        dots = "; * stands for one part between dots" if "*" in one else ""
        matched = _matching(one, known, f"norm; the norms are {join_names(filled) or 'none'}{dots}")
        chosen = matched if empty else [path for path in matched if path in filled]
        if not chosen:
            raise RequestError(
                f"{short_repr(one)} matches only empty slots, such as {matched[0]}, which insert and edits with a kind "
                f"fill; the norms are {join_names(filled) or 'none'}"
            )
        selected.update(chosen)
    return [path for path in known if path in selected]


def select_layers(model: Llama, pattern: str | Sequence[str]) -> list[str]:
    """The layers and branches, such as `layers.3` and `layers.3.attention`, that match a pattern or any of several.

    Raises RequestError for a pattern that matches nothing.
    """
    known = [f"layers.{i}{branch}" for i in range(len(model.layers)) for branch in ("", *(f".{b}" for b in BRANCHES))]
    what = f"layer and no branch; they are {join_names(known)}"
    return list(dict.fromkeys(path for one in split(pattern) for path in _matching(one, known, what)))


def split(pattern: str | Sequence[str]) -> list[str]:
    """The parts of a pattern, or of several, without repeats, that commas separate."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise RequestError(f"a pattern must be text or a list of texts, not {short_repr(pattern)}")
    return list(dict.fromkeys(part.strip() for several in patterns for part in _COMMA.split(several)))


def _matching(pattern: str, known: Iterable[str], what: str) -> list[str]:
    """The known paths that match. Raises RequestError, saying `what` was not found, if none does."""
    for one in (pattern, *_ends(pattern)):
        if not any(_matches(path, one) for path in known):
            raise RequestError(f"{short_repr(one)} matches no {what}")
    return [path for path in known if _matches(path, pattern)]


def _ends(pattern: str) -> Iterator[str]:
    """The pattern with the first and with the last number of its ranges: a layer that is not there is a mistake."""
    parts = [(part, _RANGE.fullmatch(part)) for part in pattern.split(".")]
    for end in (1, 2):
        yield ".".join(span[end] if span else part for part, span in parts)


def _matches(path: str, pattern: str) -> bool:
    names, patterns = path.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(_segment_matches, names, patterns))


def _segment_matches(name: str, pattern: str) -> bool:
    if span := _RANGE.fullmatch(pattern):
        return name.isdigit() and int(span[1]) <= int(name) <= int(span[2])
    return fnmatchcase(name, pattern)
