"""A norm plan as columns of boxes, read from top to bottom: the whole model, and each kind of layer."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from llama_mini.model.config import LlamaConfig
from llama_mini.model.norm_plan import BRANCHES, NormPlan
from llama_mini.model.norm_slots import HEAD_SLOTS, SLOTS, BranchPlan, NormSpec

_MOST_KINDS, _MOST_RUNS = 4, 6


class LayerKind(NamedTuple):
    """Layers with the same norms in the same slots, whatever their eps and scale; `plans` holds one plan a layer."""

    name: str
    layers: list[int]
    plans: dict[str, list[BranchPlan]]


class Box(NamedTuple):
    name: str
    detail: str = ""
    look: str = "step"  # or norm, empty, sum


class Column(NamedTuple):
    """`rows` of boxes side by side. In a branch's column the residual bypasses all rows above the sum."""

    title: str
    rows: list[list[Box]]


def layer_kinds(plan: NormPlan, n_layers: int) -> list[LayerKind]:
    """The kinds of layers, A, B and so on, in the order of their first layer."""
    kinds: dict[object, LayerKind] = {}
    for i in range(n_layers):
        branches = plan.layer(i)
        new = LayerKind(_letters(len(kinds)), [], {name: [] for name in BRANCHES})
        kind = kinds.setdefault(tuple(map(_without_numbers, branches)), new)
        kind.layers.append(i)
        for name, branch in zip(BRANCHES, branches, strict=True):
            kind.plans[name].append(branch)
    return list(kinds.values())


def diagram(config: LlamaConfig) -> list[Column]:
    """A column for the model, and two for each of the first four kinds of layer."""
    kinds = layer_kinds(config.norm_plan, config.n_layers)
    columns = [Column("The model", _model(config.norm_plan, config.n_layers, kinds))]
    for kind in kinds[:_MOST_KINDS]:
        prefix = f"{kind.name}, " if len(kinds) > 1 else ""
        for name, plans in kind.plans.items():
            columns.append(
                Column(f"{prefix}{name.replace('_', '-')}, {ranges(kind.layers)}", branch_boxes(config, name, plans))
            )
    return columns


def ranges(layers: Sequence[int]) -> str:
    """`layer 3`, or `layers 0–2, 5`, with at most six parts."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    parts = [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    more = " …" if len(parts) > _MOST_RUNS else ""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts[:_MOST_RUNS])}{more}"


def _model(plan: NormPlan, n_layers: int, kinds: list[LayerKind]) -> list[list[Box]]:
    kind_of = {layer: kind.name for kind in kinds for layer in kind.layers}
    runs = [(name, list(run)) for name, run in groupby(range(n_layers), key=lambda layer: kind_of[layer])]
    layers = [Box(ranges(run), f"kind {name}" if len(kinds) > 1 else "") for name, run in runs[:_MOST_RUNS]]
    more = [Box(f"{len(runs) - _MOST_RUNS} more groups of layers")] if len(runs) > _MOST_RUNS else []
    start, end = (
        (Box("tok_embeddings"), _norm("embed_norm", [plan.embed])),
        (_norm("norm", [plan.final]), Box("lm_head")),
    )
    return [[box] for box in (*start, *layers, *more, *end)]


def branch_boxes(config: LlamaConfig, name: str, plans: list[BranchPlan]) -> list[list[Box]]:
    """The rows of one branch, whose norms are those of `plans`; the last but one is the residual's sum."""
    slots = {slot: _norm(f"{slot}_norm", [getattr(plan, slot) for plan in plans]) for slot in SLOTS}
    alpha, beta = (_factor([getattr(plan, name) for plan in plans]) for name in ("alpha", "beta"))
    if name == "attention":
        projections = [Box(f"{head}_proj") for head in HEAD_SLOTS]
        inside = [projections, [slots[head] for head in HEAD_SLOTS], [Box("attend", "RoPE on q and k")]]
    else:
        heads = ("gate", "up") if config.gated_mlp else ("up",)
        read = Box(f"{config.activation}({heads[0]})" + " · up" * config.gated_mlp)
        inside = [[Box(f"{head}_proj") for head in heads], [slots[head] for head in heads], [read]]
    last = Box("o_proj" if name == "attention" else "down_proj")
    total = Box(f"{alpha}x + {beta}branch", look="sum")
    before = slots["pre"]
    if config.norm_plan.parallel and name == "feed_forward" and before.look == "empty":
        before = Box("attention.pre_norm")  # both branches read it
    return [[before], *inside, [slots["mid"]], [last], [slots["out"]], [total], [slots["post"]]]


def _norm(name: str, specs: Sequence[NormSpec | None]) -> Box:
    """The norm of one slot in all layers of a kind. The norms differ in eps and scale only."""
    present = [spec for spec in specs if spec is not None]
    if not present:
        return Box(name, look="empty")
    first, scales = present[0], [spec.scale for spec in present]
    details = [
        first.kind,
        "full" if first.view == "full" else "",
        {"w": "", "1+w": "1+w", "none": "no gain"}[first.gain],
        "late" if first.cast == "late" and name[0] not in HEAD_SLOTS else "",
        "" if max(scales) == min(scales) == 1 else f"× {_span(scales)}",
    ]
    return Box(name, ", ".join(filter(None, details)), "norm")


def _factor(values: list[float]) -> str:
    return "" if min(values) == max(values) == 1 else f"{_span(values)} · "


def _span(values: list[float]) -> str:
    return f"{values[0]:.3g}" if min(values) == max(values) else f"{min(values):.3g}–{max(values):.3g}"


def _without_numbers(branch: BranchPlan) -> tuple[object, ...]:
    specs = [getattr(branch, slot) for slot in SLOTS]
    return (*(spec and (spec.kind, spec.gain, spec.cast, spec.view) for spec in specs), branch.alpha, branch.beta)


def _letters(i: int) -> str:
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)
