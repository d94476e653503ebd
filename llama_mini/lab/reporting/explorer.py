"""The explorer: the report's map of all norms, and what it says of each, as plain tables and as data for its script."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.lab.ablation import AblatedNorm
from llama_mini.lab.attention_heads import AttentionHead
from llama_mini.lab.freezing import FREEZABLE, MEANS, squared_constant
from llama_mini.lab.keep import TIMES_MEDIAN, as_keep
from llama_mini.lab.massive_activations import MASSIVE, MassiveElement
from llama_mini.lab.norm_table import NormRow, effective_gain, folded_gains, norms
from llama_mini.lab.paths import layer_of
from llama_mini.lab.recording import Record, Recording
from llama_mini.lab.reporting.diagram import branch_boxes
from llama_mini.lab.table import finite
from llama_mini.lab.texts import Texts
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import BRANCHES
from llama_mini.model.norm_slots import SLOTS
from llama_mini.tokenizer import Tokenizer

_APART = {"none": "no token apart", "first": "first token apart", "massive": "massive tokens apart"}
KEEPS = tuple(_APART)
_MOST_TOKENS, _MOST_NAMED, _BINS = 256, 6, 32
_LOOKS = ((0.01, "c0"), (0.1, "c1"), (1.0, "c2"), (math.inf, "c3"))
Costs = Mapping[str, Mapping[str, AblatedNorm]]  # by `keep`, then by path
Facts = dict[str, str]


def explore(
    model: Llama,
    recording: Recording,
    other: Recording | None,
    costs: Costs,
    heads: Sequence[AttentionHead],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """The rows and columns of the map, a table for each row, and the data of the script, which JSON can hold.

    other: of other texts, whose constants are shown too.
    """
    config, tokens = model.config, _Tokens(recording, tokenizer)
    folded: Mapping[str, Tensor] = {}
    why_not_folded = ""
    try:
        folded = folded_gains(model)
    except RequestError as error:
        why_not_folded = str(error)
    data: dict[str, Any] = {}
    for row in norms(model):
        gain = effective_gain(model.get_submodule(row.path))  # type: ignore[arg-type]
        norm_costs = {keep: rows[row.path] for keep, rows in costs.items() if row.path in rows}
        after_folding, record = folded.get(row.path), recording[row.path]
        data[row.path] = {
            "row": 1 + layer_of(row.path, config.n_layers),
            "place": _place(config, row.path),
            "facts": _settings(row)
            | _gain_facts(gain, after_folding)
            | tokens.facts(record)
            | _costs(row, norm_costs)
            | _constants(row, [each for each in (recording, other) if each is not None]),
            "gain": _histogram(gain),
            "folded": _histogram(after_folding),
            "rms": tokens.series(record),
            "limit": finite(tokens.limit(record)),
        }
    massive = recording.massive()
    layers = [_layer(i, recording, massive, heads, tokens) for i in range(config.n_layers)]
    columns = _columns(data)
    return {
        "columns": [(branch, list(slots)) for branch, slots in groupby(columns, key=lambda column: column[0])],
        "rows": _map(config, columns, data, costs),
        "tables": _tables(config, data, layers),
        "why_not_folded": why_not_folded,
        "data": {"norms": data, "layers": layers, "tokens": tokens.words[:_MOST_TOKENS]},
    }


# --- the map ---


def _columns(paths: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Branches and slots that hold a norm in some layer, and + for the residual's sum, in the order of the forward."""
    slots = [f"{slot}_norm" for slot in SLOTS]
    slots.insert(-1, "+")
    used = {tuple(path.split(".")[2:]) for path in paths}
    return [(branch, slot) for branch in BRANCHES for slot in slots if slot == "+" or (branch, slot) in used]


def _map(
    config: LlamaConfig, columns: list[tuple[str, str]], paths: Mapping[str, Any], costs: Costs
) -> list[dict[str, Any]]:
    def cell(path: str) -> dict[str, Any] | None:
        looks = [(keep, *_look(costs[keep].get(path) if keep in costs else None)) for keep in KEEPS]
        return {"path": path, "looks": looks} if path in paths else None

    def layer(i: int) -> list[dict[str, Any] | str | None]:
        sums = {branch: branch_boxes(config, branch, [plan])[-2][0] for branch, plan in _branches(config, i)}
        cells = [(f"layers.{i}.{branch}.{slot}", sums[branch].name, slot) for branch, slot in columns]
        return [total if slot == "+" else cell(path) for path, total, slot in cells]

    rows: list[dict[str, Any]] = [{"name": f"layer {i}", "cells": layer(i)} for i in range(config.n_layers)]
    ends: list[dict[str, Any]] = [
        {"name": name, "cells": [], "end": cell(path)}
        for name, path in (("embedding", "embed_norm"), ("final", "norm"))
    ]
    return [ends[0], *rows, ends[1]]


def _look(cost: AblatedNorm | None) -> tuple[str, str]:
    """The class of a cost in the map, and its text."""
    if cost is None:
        return "grey", "·"
    if cost.error is not None:
        return "c3", "NaN"
    size = abs(cost.dloss)
    text = f"{cost.dloss:+.3f}".replace("0.", ".") if size < 1 else f"{cost.dloss:+.1f}"
    return ("grey" if _in_noise(cost) else next(look for limit, look in _LOOKS if size < limit)), text


def _in_noise(cost: AblatedNorm) -> bool:
    return abs(cost.dloss) <= 2 * cost.se


def _branches(config: LlamaConfig, layer: int) -> Any:
    return zip(BRANCHES, config.norm_plan.layer(layer), strict=True)


def _place(config: LlamaConfig, path: str) -> list[list[str]]:
    """The steps around a norm in the order of the forward pass; those side by side are one step."""
    if path == "embed_norm":
        return [["tok_embeddings"], [path], ["layers.0"]]
    if path == "norm":
        return [[f"layers.{config.n_layers - 1}"], [path], ["lm_head"]]
    _, layer, name, _ = path.split(".")
    boxes = branch_boxes(config, name, [dict(_branches(config, int(layer)))[name]])
    steps = [[box.name for box in row if box.look != "empty"] for row in boxes]
    return [["x"], *(step for step in steps if step)]


# --- the facts ---


def _settings(row: NormRow) -> Facts:
    scale = f", output × {row.scale:.4g}" if row.scale != 1 else ""
    bias = ", bias" if row.bias else ""
    return {"settings": f"kind {row.kind}, eps {row.eps:g}, gain {row.gain}, cast {row.cast}{bias}{scale}"}


def _gain_facts(gain: Tensor | None, folded: Tensor | None) -> Facts:
    facts = {} if gain is None else {"gain": _spread(gain)}
    return facts if folded is None else facts | {"gain after folding": _spread(folded)}


def _spread(values: Tensor) -> str:
    low, high = int(values.argmin()), int(values.argmax())
    if len(values) == 1:
        return f"{float(values):.4g}"
    return (
        f"min {float(values[low]):.4g} (dimension {low}), median {float(values.double().quantile(0.5)):.4g}, "
        f"max {float(values[high]):.4g} (dimension {high})"
    )


def _histogram(gain: Tensor | None) -> dict[str, Any] | None:
    """Counts of equally wide bins from the smallest gain to the largest."""
    if gain is None or len(gain) == 1 or not gain.isfinite().all():
        return None
    low, high = float(gain.min()), float(gain.max())
    return {"low": low, "high": high, "counts": gain.float().cpu().histc(_BINS, low, high).int().tolist()}


class _Tokens:
    """The tokens of the texts, and what a norm reads of them."""

    def __init__(self, recording: Recording, tokenizer: Tokenizer | None) -> None:
        self.real, self.several = recording.texts.real, len(recording.texts.real) > 1
        self.ids, self.tokenizer = recording.texts.tokens, tokenizer
        self.words = [self.word(0, i) for i in range(int(self.real[0].sum()))]

    def word(self, row: int, token: int) -> str:
        """`13 ' the'`, or of several texts `text 1: 13 ' the'`."""
        text = f"{token}"
        if self.tokenizer is not None:
            text += f" {self.tokenizer.decode([int(self.ids[row, token])], skip_special_tokens=False)!r}"
        return f"text {row}: {text}" if self.several else text

    def limit(self, record: Record) -> float:
        """The RMS above which a token is massive."""
        return TIMES_MEDIAN * float(_of_tokens(record)[self.real].double().quantile(0.5))

    def facts(self, record: Record) -> Facts:
        massive = ((_of_tokens(record) > self.limit(record)) & self.real).nonzero().tolist()
        names = ", ".join(self.word(*place) for place in massive[:_MOST_NAMED])
        more = f" and {len(massive) - _MOST_NAMED} more" if len(massive) > _MOST_NAMED else ""
        return {
            "RMS of its input": f"first token {record.first:.4g}, median of the others {record.median:.4g}",
            f"tokens above {TIMES_MEDIAN:g} times the median": f"{len(massive)}: {names}{more}" if massive else "none",
        }

    def series(self, record: Record) -> list[float | None]:
        """The RMS of the first text's tokens, to four digits."""
        return [
            finite(float(f"{value:.4g}")) for value in _of_tokens(record)[0, : len(self.words)][:_MOST_TOKENS].tolist()
        ]


def _of_tokens(record: Record) -> Tensor:
    """The RMS of each token, in q and k norms over its heads, as `keep` takes it: (B, T)."""
    return record.rms.unsqueeze(-1).flatten(2).square().mean(-1).sqrt()


def _costs(row: NormRow, costs: Mapping[str, AblatedNorm]) -> Facts:
    if not costs:
        return {"cost of freezing": f"a norm of kind {row.kind} cannot be frozen"}
    return {f"cost, {_APART[keep]}": _cost(cost) for keep, cost in costs.items()}


def _constants(row: NormRow, recordings: Sequence[Recording]) -> Facts:
    """What the norm divides by if it is frozen: the three means of each text."""
    if row.kind not in FREEZABLE:
        return {}
    return {
        f"constant, {_APART[keep]}": "; of the other text ".join(
            _means(each[row.path], each.texts, row.eps, keep) for each in recordings
        )
        for keep in KEEPS
    }


def _means(record: Record, texts: Texts, eps: float, keep: str) -> str:
    rms = _of_tokens(record)
    median = float(rms[texts.real].double().quantile(0.5))
    kept = as_keep(keep).mask(rms, median, texts.tokens, torch.arange(rms.shape[1], device=rms.device)[None])
    squares = record.rms[texts.real & ~kept].double().square() + eps
    if not len(squares):
        return "no token is left"
    return ", ".join(f"{mean} {float(squared_constant(squares, mean).sqrt()):.4g}" for mean in MEANS)


def _cost(cost: AblatedNorm) -> str:
    if cost.error is not None:
        return cost.error
    noise = " (within two standard errors of 0)" if _in_noise(cost) else ""
    return f"{cost.dloss:+.4g} ± {cost.se:.2g}{noise}, KL {cost.kl:.3g}, same top token {cost.top1:.1%}"


def _layer(
    i: int, recording: Recording, massive: Sequence[MassiveElement], heads: Sequence[AttentionHead], tokens: _Tokens
) -> dict[str, Any]:
    stream, masses = recording.resid.resid_pre[i], [head.first_mass for head in heads if head.layer == i]
    born = [element for element in massive if element.layer == i]
    mean = sum(masses) / len(masses)
    return {
        "facts": {
            "stream before it": f"RMS: first token {stream.first:.4g}, median of the others {stream.median:.4g}",
            "attention to the first token": f"mean {mean:.3g}, heads from {min(masses):.2g} to {max(masses):.2g}",
            f"massive activations after it, {MASSIVE} times the median": _massive(born, tokens),
        },
        "heads": [round(mass, 4) for mass in masses],
    }


def _massive(elements: list[MassiveElement], tokens: _Tokens) -> str:
    if not elements:
        return "none"
    top = max(elements, key=lambda element: element.times_median)
    return (
        f"{len(elements)}; the largest is dimension {top.dim} of token {tokens.word(top.row, top.token)}, "
        f"{top.times_median:,.0f} times the median"
    )


def _tables(config: LlamaConfig, data: Mapping[str, Any], layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row of the map with norms or a layer: its facts, its norms, and a line for each fact of a norm."""
    tables = []
    for row in range(config.n_layers + 2):
        own = {path: norm["facts"] for path, norm in data.items() if norm["row"] == row}
        layer = layers[row - 1]["facts"] if 1 <= row <= config.n_layers else {}
        name = f"layer {row - 1}" if layer else "embedding" if row == 0 else "final"
        facts = dict.fromkeys(fact for facts in own.values() for fact in facts)
        lines = [(fact, [facts.get(fact, "–") for facts in own.values()]) for fact in facts]
        tables.append({"name": name, "facts": layer, "paths": list(own), "lines": lines})
    return [table for table in tables if table["facts"] or table["paths"]]
