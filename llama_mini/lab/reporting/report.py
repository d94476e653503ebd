"""The report: everything the lab finds out about one model and one text, as one HTML file."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import llama_mini
from llama_mini.lab.ablation import ablate, skip_layers
from llama_mini.lab.cost import as_tokens, score
from llama_mini.lab.diagnosis import doctor
from llama_mini.lab.norm_table import norms
from llama_mini.lab.paths import select
from llama_mini.lab.recording import MASSIVE, Recording, capture, massive_activation
from llama_mini.lab.reporting import figures
from llama_mini.lab.reporting.diagram import layer_kinds, plan_diagram, ranges
from llama_mini.lab.reporting.page import (
    COMMAND,
    Shell,
    caption,
    facts,
    folded,
    number,
    page,
    paragraph,
    picture,
    section,
    table,
)
from llama_mini.lab.reporting.plans import init_section, race_section
from llama_mini.lab.reporting.style import check_drawable, svg, write_whole
from llama_mini.lab.training import Race
from llama_mini.machine import dtype_name
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer

_MOST_ELEMENTS = 12
_FREEZABLE = ("rms", "scale")  # they divide by the root mean square


def report(
    path: str | Path,
    model: Llama,
    ids: Tensor | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    name: str = "a model",
    race: Race | None = None,
    shell: Shell | None = None,
) -> Path:
    """Writes one HTML file that needs no network and no script, and returns its path.

    ids: the text, (T,), (B, T) or a list. Each norm and each layer costs a forward pass over it, and every activation
        of one pass is held at once.
    tokenizer: shows tokens as text. name: of the checkpoint, for people. race: trainings, whose curves are added.
    shell: of the command line, whose captions are commands; without it they are calls.

    Raises RequestError for ids that the model cannot read, where the file cannot be written, or without matplotlib.
    """
    target = Path(path)
    tokens = as_tokens(model, ids)
    check_drawable(target)
    steps: list[Callable[[], str]] = [
        lambda: _checkpoint(model, tokens, tokenizer, name),
        lambda: _plan(model, shell),
        lambda: _activations(model, tokens, tokenizer, shell),
        lambda: _costs(model, tokens, shell),
        lambda: _gains(model, shell),
        lambda: _layers(model, tokens, shell),
        lambda: _findings(model, tokens, shell),
        lambda: init_section(model),
    ]
    if race is not None:
        steps.append(lambda: race_section(race, shell is not None))
    bar = tqdm(steps, "report", unit="section", delay=1, leave=False, disable=None)
    sections = [step() for step in bar]
    write_whole(target, page(f"The norms of {name}", sections).encode(errors="replace"))
    return target


def _checkpoint(model: Llama, tokens: Tensor, tokenizer: Tokenizer | None, name: str) -> str:
    config, base = model.config, score(model, tokens)
    rows = {
        "model": name,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, {_dtype(model)}",
        "shape": f"{config.n_layers} layers, dim {config.dim}, hidden {config.hidden_dim}, {config.n_heads} heads of "
        f"{config.head_dim}, {config.n_kv_heads} KV heads, vocabulary {config.vocab_size:,}",
        "norms": f"{config.norm_plan.name(config.n_layers)}: {len(norms(model))}",
        "text": f"{tokens.numel():,} tokens in {len(tokens)} row{'s' if len(tokens) > 1 else ''}"
        + (f", beginning {_shown(tokenizer, tokens[0, :24].tolist())}" if tokenizer else ""),
        "loss on it": f"{base.loss:.4f} nats per token, perplexity {base.perplexity:.4g}",
        "made by": f"llama_mini {llama_mini.__version__}, torch {torch.__version__}",
    }
    return section("The checkpoint", facts(rows))


def _plan(model: Llama, shell: Shell | None) -> str:
    config = model.config
    kinds = layer_kinds(config.norm_plan, config.n_layers)
    alike = f"All {config.n_layers} layers have the same norms in the same slots."
    if len(kinds) > 1:
        alike = f"There are {len(kinds)} kinds of layers: "
        alike += "; ".join(f"{kind.name}, {ranges(kind.layers)}" for kind in kinds[:4]) + (
            "; the others are not drawn." if len(kinds) > 4 else "."
        )
    seen = "Full boxes are norms, dashed ones are empty slots; x is the residual stream, which runs on the left. "
    return section(
        "Where the norms are",
        plan_diagram(config.norm_plan, config.n_layers),
        caption(seen + alike, f"{COMMAND} norms {shell.model}" if shell else "model.config.norm_plan"),
    )


def _activations(model: Llama, tokens: Tensor, tokenizer: Tokenizer | None, shell: Shell | None) -> str:
    recording = capture(model, tokens)
    first, last = (
        float(figures.besides_first(point.rms).quantile(0.5))
        for point in (recording.resid.resid_pre[0], recording.resid.resid_post[-1])
    )
    seen = (
        f"The residual stream's RMS goes from {first:.3g} before the layers to {last:.3g} after them (median over all "
        "tokens but the first of a row); marks are what the norms make of it. q, k and v norms see heads and are left "
        "out."
    )
    drawn = svg(figures.residual_rms_picture(recording), "rms")
    command = shell.command("capture --picture rms.svg") if shell else "lab.capture(model, ids)"
    stream = section("The residual stream", picture(drawn, seen, command, "RMS of the residual stream by layer"))
    return stream + _massive(recording, tokens, tokenizer, shell)


def _massive(recording: Recording, tokens: Tensor, tokenizer: Tokenizer | None, shell: Shell | None) -> str:
    born = massive_activation(recording)
    seen = f"No layer's output holds an element that jumps to {MASSIVE} times the median or more."
    if born is not None:
        token = int(tokens[born.row, born.token])
        seen = (
            f"A massive activation is born in layer {born.layer}, in dimension {born.dim} at token {born.token}"
            f"{f', {_shown(tokenizer, [token])}' if tokenizer else ''}: {number(born.value)}, which is "
            f"{born.times_median:,.0f} times the median of the layer's output, a ratio {born.growth:,.3g} times that "
            "of its input."
        )
    drawn = picture(
        svg(figures.massive_picture(recording), "massive"),
        seen,
        shell.command("capture") if shell else "lab.massive_activation(lab.capture(model, ids))",
        "Largest element over the median by layer",
    )
    rows = _massive_elements(recording, tokens, tokenizer)
    what = (
        f"Elements of {MASSIVE} times the median or more, the largest first, {_MOST_ELEMENTS} at most, with the layer "
        "whose output holds them first, which may be before the jump, and the one where they are largest."
    )
    return section("Massive activations", drawn, *([paragraph(what), table(rows)] if rows else []))


def _massive_elements(recording: Recording, tokens: Tensor, tokenizer: Tokenizer | None) -> list[dict[str, object]]:
    """Each element of the layers' outputs that is massive anywhere: from which layer on, and how large it gets."""
    found: dict[tuple[int, ...], dict[str, object]] = {}
    largest: dict[tuple[int, ...], float] = {}
    for layer, record in enumerate(recording.resid.resid_post):
        assert record.x is not None
        x = record.x.float()
        median = x.abs().median()
        times = (x.abs() / median).flatten()
        top = times.topk(min(_MOST_ELEMENTS, len(times)))
        for index in top.indices[top.values >= MASSIVE]:
            row, token, dim = (int(i) for i in torch.unravel_index(index, x.shape))
            value, ratio = float(x[row, token, dim]), float(times[index])
            here = found.setdefault(
                (row, token, dim), {"first in layer": layer, "row": row, "token": token, "dimension": dim}
            )
            if ratio > largest.get((row, token, dim), 0):
                largest[row, token, dim] = ratio
                here |= {"largest value": value, "times the median": ratio, "largest in layer": layer}
                if tokenizer:
                    here["text"] = _shown(tokenizer, [int(tokens[row, token])])
    order = sorted(found, key=lambda place: -largest[place])[:_MOST_ELEMENTS]
    return [found[place] for place in order]


def _costs(model: Llama, tokens: Tensor, shell: Shell | None) -> str:
    title, rows = "What each norm's statistic is worth", norms(model)
    paths = [row.path for row in rows if row.kind in _FREEZABLE]
    if not paths:
        return section(title, paragraph(f"No norm of this model is of kind {' or '.join(_FREEZABLE)}."))
    costs = ablate(model, tokens, paths, freeze="mean", keep_first=True)
    worst = max(costs, key=lambda row: row.dloss)
    free = sum(abs(row.dloss) < 0.01 for row in costs)
    seen = (
        "A bar is what it costs to divide by one number, a norm's mean RMS over the text, in place of each token's own "
        f"(the first token keeps its own). Dearest is {worst.path}, {worst.dloss:+.3g} nats per token; {free} of "
        f"{len(costs)} norms cost less than 0.01 either way."
        + (f" {len(rows) - len(paths)} norms of other kinds are left out." if len(rows) > len(paths) else "")
    )
    command = "lab.ablate(model, ids, freeze='mean', keep_first=True)"
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in paths))
    if shell and select(model, patterns) == paths:
        command = shell.command(f"ablate {shlex.quote(','.join(patterns))} --picture cost.svg")
    drawn = picture(svg(figures.norm_cost_picture(costs), "cost"), seen, command, "Cost of freezing each norm")
    return section(title, drawn, folded("The numbers", table(costs)))


def _gains(model: Llama, shell: Shell | None) -> str:
    rows = norms(model)
    gained = [row for row in rows if row.mean is not None]
    if not gained:
        return section("Gains", paragraph("No norm of this model has a gain."))
    numbers = folded("Every norm", table(rows))
    if not any(row.path.startswith("layers.") for row in gained):
        return section("Gains", paragraph("No norm of the layers has a gain."), numbers)
    ours = {row.path: row for row in gained if "." not in row.path}
    seen = "The least, mean and largest effective gain of each norm of the layers. "
    seen += " ".join(f"{p} has {r.min:.3g}, {r.mean:.3g} and {r.max:.3g}." for p, r in ours.items())
    command = f"{COMMAND} norms --picture gains.svg {shell.model}" if shell else "lab.norms(model)"
    drawn = picture(svg(figures.gain_picture(rows), "gain"), seen, command, "Gains by layer")
    return section("Gains", drawn, numbers)


def _layers(model: Llama, tokens: Tensor, shell: Shell | None) -> str:
    rows = skip_layers(model, tokens)
    dear, cheap = max(rows, key=lambda row: row.dloss), min(rows, key=lambda row: row.dloss)
    seen = (
        f"Leaving out layer {dear.layer} costs most, {dear.dloss:+.3g} nats per token, layer {cheap.layer} least, "
        f"{cheap.dloss:+.3g}; below, the mean angle between a layer's input and its output."
    )
    command = shell.command("skip --picture layers.svg") if shell else "lab.skip_layers(model, ids)"
    drawn = picture(svg(figures.skip_picture(rows), "skip"), seen, command, "Cost of each layer")
    return section("What each layer is worth", drawn, folded("The numbers", table(rows)))


def _findings(model: Llama, tokens: Tensor, shell: Shell | None) -> str:
    found = doctor(model, tokens)
    said = table(found) if len(found) else paragraph("Nothing found.")
    command = shell.command("doctor") if shell else "lab.doctor(model, ids)"
    return section("The doctor's findings", said, caption("What is likely wrong with the norms.", command))


def _dtype(model: Llama) -> str:
    return dtype_name(model.dtype)


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return repr(tokenizer.decode(ids, skip_special_tokens=False))
