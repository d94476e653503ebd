"""A norm plan drawn as blocks, in SVG: the whole model, and each kind of layer that it has."""

from collections.abc import Sequence
from html import escape
from itertools import groupby, pairwise
from typing import NamedTuple

from llama_mini.lab.reporting.style import BLUE
from llama_mini.model.norm_plan import NormPlan
from llama_mini.model.norm_slots import SLOTS, BranchPlan, NormSpec

_WIDTH, _BOX, _GAP, _LEFT = 300, 36, 16, 40  # pixels; the residual runs in the left margin
_MOST_KINDS, _MOST_RUNS = 4, 6


class LayerKind(NamedTuple):
    """Layers with the same norms in the same slots, whatever their eps and scale; by branch, the plan of each."""

    name: str
    layers: list[int]
    attention: list[BranchPlan]
    feed_forward: list[BranchPlan]


class _Box(NamedTuple):
    name: str
    detail: str = ""
    look: str = "step"  # or norm, empty, sum


_Row = list[_Box]


def layer_kinds(plan: NormPlan, n_layers: int) -> list[LayerKind]:
    """The kinds of layers, A, B and so on, in the order of their first layer."""
    found: dict[object, LayerKind] = {}
    for i in range(n_layers):
        attention, feed_forward = plan.layer(i)
        key = _drawn(attention), _drawn(feed_forward)
        kind = found.setdefault(key, LayerKind(_letters(len(found)), [], [], []))
        kind.layers.append(i)
        kind.attention.append(attention)
        kind.feed_forward.append(feed_forward)
    return list(found.values())


def plan_diagram(plan: NormPlan, n_layers: int) -> str:
    """HTML: a column for the model, and two for each kind of layer."""
    kinds = layer_kinds(plan, n_layers)
    columns = [("The model", _svg(_model_rows(plan, n_layers, kinds)))]
    for kind in kinds[:_MOST_KINDS]:
        name = f"{kind.name}, " if len(kinds) > 1 else ""
        columns.append((f"{name}attention, {ranges(kind.layers)}", _svg(_attention_rows(kind.attention))))
        columns.append((f"{name}feed-forward, {ranges(kind.layers)}", _svg(_feed_forward_rows(kind.feed_forward))))
    drawn = "".join(f"<div><h3>{title}</h3>{svg}</div>" for title, svg in columns)
    return f'<div class="blocks">{drawn}</div>'


def ranges(layers: Sequence[int]) -> str:
    """`layer 3`, or `layers 0–2, 5`, no more than six parts."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    parts = [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    listed = ", ".join(parts[:_MOST_RUNS]) + (" …" if len(parts) > _MOST_RUNS else "")
    return f"layer{'s' if len(layers) > 1 else ''} {listed}"


def _model_rows(plan: NormPlan, n_layers: int, kinds: list[LayerKind]) -> list[_Row]:
    kind_of = {layer: kind.name for kind in kinds for layer in kind.layers}
    runs = [(name, list(run)) for name, run in groupby(range(n_layers), key=lambda layer: kind_of[layer])]
    drawn = [_Box(ranges(run), f"kind {name}" if len(kinds) > 1 else "") for name, run in runs[:_MOST_RUNS]]
    more = [_Box(f"{len(runs) - _MOST_RUNS} more groups of layers")] if len(runs) > _MOST_RUNS else []
    boxes = [_Box("tok_embeddings"), _norm("embed_norm", [plan.embed]), *drawn, *more]
    return [[box] for box in [*boxes, _norm("norm", [plan.final]), _Box("lm_head")]]


def _attention_rows(branches: list[BranchPlan]) -> list[_Row]:
    return [
        [_slot(branches, "pre")],
        [_Box("q_proj"), _Box("k_proj"), _Box("v_proj")],
        [_slot(branches, "q"), _slot(branches, "k"), _slot(branches, "v")],
        [_Box("attend", "q and k turned by RoPE")],
        [_slot(branches, "mid")],
        [_Box("o_proj")],
        *_end(branches),
    ]


def _feed_forward_rows(branches: list[BranchPlan]) -> list[_Row]:
    return [
        [_slot(branches, "pre")],
        [_Box("gate_proj"), _Box("up_proj")],
        [_Box("silu(gate) · up")],
        [_slot(branches, "mid")],
        [_Box("down_proj")],
        *_end(branches),
    ]


def _end(branches: list[BranchPlan]) -> list[_Row]:
    alpha, beta = (_factor([getattr(branch, name) for branch in branches]) for name in ("alpha", "beta"))
    total = _Box(f"{alpha}x + {beta}branch", look="sum")
    return [[_slot(branches, "out")], [total], [_slot(branches, "post")]]


def _slot(branches: list[BranchPlan], slot: str) -> _Box:
    return _norm(f"{slot}_norm", [getattr(branch, slot) for branch in branches])


def _norm(name: str, specs: Sequence[NormSpec | None]) -> _Box:
    """The norm of a slot in all layers of a kind: alike but for eps and scale."""
    present = [spec for spec in specs if spec is not None]
    if not present:
        return _Box(name, look="empty")
    scales = [spec.scale for spec in present]
    scale = "" if max(scales) == min(scales) == 1 else f"× {_span(scales)}"
    gain = {"w": "", "1+w": "1+w", "none": "no gain"}[present[0].gain]
    view = "full" if present[0].view == "full" else ""
    cast = "late" if present[0].cast == "late" and name[:2] not in ("q_", "k_", "v_") else ""
    return _Box(name, ", ".join(part for part in (present[0].kind, view, gain, cast, scale) if part), "norm")


def _factor(values: list[float]) -> str:
    return "" if min(values) == max(values) == 1 else f"{_span(values)} · "


def _span(values: list[float]) -> str:
    return f"{values[0]:.3g}" if min(values) == max(values) else f"{min(values):.3g}–{max(values):.3g}"


def _drawn(branch: BranchPlan) -> tuple[object, ...]:
    specs = [getattr(branch, slot) for slot in SLOTS]
    return (*tuple(spec and (spec.kind, spec.gain, spec.cast, spec.view) for spec in specs), branch.alpha, branch.beta)


def _letters(i: int) -> str:
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _svg(rows: list[_Row]) -> str:
    """Rows of boxes from top to bottom, joined by lines; the residual goes around what stands above a sum."""
    step = _BOX + _GAP
    height = _GAP + len(rows) * step
    parts = []
    joined = [[_Box("", look="input")], *rows]
    for i, (above, below) in enumerate(pairwise(joined)):
        for a in _centres(above):
            for b in _centres(below):
                if len(above) != len(below) or a == b:
                    parts.append(_line(a, i * step, b, i * step + _GAP))
    parts.append(_line(_centres([rows[-1][0]])[0], height - _GAP, _centres([rows[-1][0]])[0], height))
    for i, row in enumerate(rows):
        top = _GAP + i * step
        if row[0].look == "sum":
            middle, x = top + _BOX / 2, _centres(row)[0]
            edge = x - _box_width(row) / 2
            parts.append(
                f'<path d="M{x:g} 4H12V{middle:g}H{edge:g}m-7 -5l7 5l-7 5" fill="none" stroke="currentColor" '
                'stroke-width="1.5"/>'
            )
        width = _box_width(row)
        parts += [_box(box, x - width / 2, top, width) for box, x in zip(row, _centres(row), strict=True)]
    names = ", ".join(f"{box.name} {box.detail}".strip() for row in rows for box in row if box.look != "empty")
    label = escape(f"From top to bottom: {names}")
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _box_width(row: _Row) -> float:
    return (_WIDTH - _LEFT - 8 * (len(row) - 1) - 2) / len(row) if len(row) > 1 else (_WIDTH - _LEFT) * 0.72


def _centres(row: _Row) -> list[float]:
    middle, apart = (_WIDTH + _LEFT) / 2, _box_width(row) + 8
    return [middle + (i - (len(row) - 1) / 2) * apart for i in range(len(row))]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="currentColor" stroke-opacity=".6"/>'


def _box(box: _Box, left: float, top: float, width: float) -> str:
    look = {
        "step": 'fill="none" stroke="currentColor"',
        "sum": 'fill="none" stroke="currentColor" stroke-width="1.5"',
        "norm": f'fill="{BLUE}"',
        "empty": 'fill="none" stroke="currentColor" stroke-opacity=".6" stroke-dasharray="3 3"',
    }[box.look]
    radius = _BOX / 2 if box.look == "sum" else 5
    rect = f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{_BOX}" rx="{radius:g}" {look}/>'
    ink = "#fff" if box.look == "norm" else "currentColor"
    faint = ' fill-opacity=".75"' if box.look == "empty" else ""
    lines = [box.name, box.detail] if box.detail else [box.name]
    first = top + _BOX / 2 + (4 if len(lines) == 1 else -3)
    text = "".join(
        f'<text x="{left + width / 2:g}" y="{first + 14 * i:g}" font-size="{12 - i}" text-anchor="middle" '
        f'fill="{ink}"{faint}>{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return rect + text
