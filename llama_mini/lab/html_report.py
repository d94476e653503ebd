"""The report: everything the lab finds out about one model and one text, as one HTML file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import llama_mini
from llama_mini.checks import listed
from llama_mini.errors import RequestError
from llama_mini.info import plan_name
from llama_mini.lab import pictures
from llama_mini.lab.ablation import ablate, skip_layers
from llama_mini.lab.cost import as_tokens, score
from llama_mini.lab.diagnosis import doctor
from llama_mini.lab.diagram import layer_kinds, plan_diagram, ranges
from llama_mini.lab.drawing import svg, write_whole
from llama_mini.lab.html_page import caption, facts, folded, number, page, paragraph, picture, section, table
from llama_mini.lab.measurement import init
from llama_mini.lab.norm_table import norms
from llama_mini.lab.recording import Recording, capture, massive_activation
from llama_mini.lab.theory import Profile, predict
from llama_mini.lab.training import Race
from llama_mini.model import Llama
from llama_mini.tokenizer import Tokenizer

_MASSIVE = 100  # times the median, as recording.py has it
_MOST_ELEMENTS = 12
_FREEZABLE = ("rms", "scale")  # they divide by the root mean square
_DIM, _SEEDS = 256, 3  # of the random models


def report(
    path: str | Path,
    model: Llama,
    ids: Tensor | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    name: str = "a model",
    race: Race | None = None,
) -> Path:
    """Writes one HTML file that needs no network and no script, and returns its path.

    ids: the text, (T,), (B, T) or a list. Each norm and each layer costs a forward pass over it, and every activation
        of one pass is held at once.
    tokenizer: shows tokens as text. name: of the checkpoint, for people. race: trainings, whose curves are added.

    Raises RequestError for ids that the model cannot read, where the file cannot be written, or without matplotlib.
    """
    target = Path(path)
    tokens = as_tokens(model, ids)
    if not target.parent.is_dir():
        raise RequestError(f"cannot write {target}: there is no folder {target.parent}; make it first")
    steps: list[Callable[[], str]] = [
        lambda: _checkpoint(model, tokens, tokenizer, name),
        lambda: _plan(model),
        lambda: _activations(model, tokens, tokenizer),
        lambda: _costs(model, tokens),
        lambda: _gains(model),
        lambda: _layers(model, tokens),
        lambda: _findings(model, tokens),
        lambda: _init(model),
    ]
    if race is not None:
        steps.append(lambda: _race(race))
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
        "norms": f"{plan_name(config)}: {len(norms(model))}",
        "text": f"{tokens.numel():,} tokens in {len(tokens)} row{'s' if len(tokens) > 1 else ''}"
        + (f", beginning {_shown(tokenizer, tokens[0, :24].tolist())}" if tokenizer else ""),
        "loss on it": f"{base.loss:.4f} nats per token, perplexity {base.perplexity:.4g}",
        "made by": f"llama_mini {llama_mini.__version__}, torch {torch.__version__}",
    }
    return section("The checkpoint", facts(rows))


def _plan(model: Llama) -> str:
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
        caption(seen + alike, "model.config.norm_plan"),
    )


def _activations(model: Llama, tokens: Tensor, tokenizer: Tokenizer | None) -> str:
    recording = capture(model, tokens)
    first, last = (
        float(pictures.besides_first(point.rms).quantile(0.5))
        for point in (recording.resid.resid_pre[0], recording.resid.resid_post[-1])
    )
    seen = (
        f"The residual stream's RMS goes from {first:.3g} before the layers to {last:.3g} after them (median over all "
        "tokens but the first of a row); marks are what the norms make of it. q, k and v norms see heads and are left "
        "out."
    )
    drawn = svg(pictures.residual_rms_picture(recording), "rms")
    stream = section(
        "The residual stream", picture(drawn, seen, "lab.capture(model, ids)", "RMS of the residual stream by layer")
    )
    return stream + _massive(recording, tokens, tokenizer)


def _massive(recording: Recording, tokens: Tensor, tokenizer: Tokenizer | None) -> str:
    born = massive_activation(recording)
    seen = f"No layer's output holds an element that jumps to {_MASSIVE} times the median or more."
    if born is not None:
        token = int(tokens[born.row, born.token])
        seen = (
            f"A massive activation is born in layer {born.layer}, in dimension {born.dim} at token {born.token}"
            f"{f', {_shown(tokenizer, [token])}' if tokenizer else ''}: {number(born.value)}, which is "
            f"{born.times_median:,.0f} times the median of the layer's output, a ratio {born.growth:,.3g} times that "
            "of its input."
        )
    drawn = picture(
        svg(pictures.massive_picture(recording, _MASSIVE), "massive"),
        seen,
        "massive_activation(lab.capture(model, ids))",
        "Largest element over the median by layer",
    )
    rows = _massive_elements(recording, tokens, tokenizer)
    what = (
        f"Elements of {_MASSIVE} times the median or more, the largest first, {_MOST_ELEMENTS} at most, with the layer "
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
        for index in top.indices[top.values >= _MASSIVE]:
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


def _costs(model: Llama, tokens: Tensor) -> str:
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
    drawn = picture(svg(pictures.norm_cost_picture(costs), "cost"), seen, command, "Cost of freezing each norm")
    return section(title, drawn, folded("The numbers", table(costs)))


def _gains(model: Llama) -> str:
    rows = norms(model)
    gained = [row for row in rows if row.mean is not None]
    if not gained:
        return section("Gains", paragraph("No norm of this model has a gain."))
    ours = {row.path: row for row in gained if "." not in row.path}
    seen = "The least, mean and largest effective gain of each norm of the layers. "
    seen += " ".join(f"{p} has {r.min:.3g}, {r.mean:.3g} and {r.max:.3g}." for p, r in ours.items())
    drawn = picture(svg(pictures.gain_picture(rows), "gain"), seen, "lab.norms(model)", "Gains by layer")
    return section("Gains", drawn, folded("Every norm", table(rows)))


def _layers(model: Llama, tokens: Tensor) -> str:
    rows = skip_layers(model, tokens)
    dear, cheap = max(rows, key=lambda row: row.dloss), min(rows, key=lambda row: row.dloss)
    seen = (
        f"Leaving out layer {dear.layer} costs most, {dear.dloss:+.3g} nats per token, layer {cheap.layer} least, "
        f"{cheap.dloss:+.3g}; below, the mean angle between a layer's input and its output."
    )
    drawn = picture(svg(pictures.skip_picture(rows), "skip"), seen, "lab.skip_layers(model, ids)", "Cost of each layer")
    return section("What each layer is worth", drawn, folded("The numbers", table(rows)))


def _findings(model: Llama, tokens: Tensor) -> str:
    found = doctor(model, tokens)
    said = table(found) if len(found) else paragraph("Nothing found.")
    return section(
        "The doctor's findings", said, caption("What is likely wrong with the norms.", "lab.doctor(model, ids)")
    )


def _init(model: Llama) -> str:
    plan, depth = model.config.norm_plan, model.config.n_layers
    title = "Theory against measurement, at random init"
    try:
        predicted = predict(plan, depth)
    except RequestError as error:
        return section(title, paragraph(f"There is no prediction: {error}."))
    measured = init(plan, depth, dim=_DIM, seeds=_SEEDS)
    off = measured.deviation(predicted)
    seen = (
        f"{depth} random layers of width {_DIM} with this model's plan: what theory says without a model (line) and "
        f"what {_SEEDS} models give (marks). Largest deviation: {_off(off['second_moment'])} in the second moment, "
        f"{_off(off['gradient'])} in the gradient, {_off(off['angle'])} in the angle."
    )
    command = f"lab.predict(plan, {depth}), lab.init(plan, {depth}, dim={_DIM}, seeds={_SEEDS})"
    drawn = svg(pictures.init_picture(predicted, measured), "init")
    return section(
        title, picture(drawn, seen, command, "Prediction and measurement by layer"), _ends(predicted, measured)
    )


def _ends(predicted: Profile, measured: Profile) -> str:
    lines = zip(predicted.table(), measured.table(), strict=True)
    rows = [
        {f"{name} {who}": getattr(row, name) for name in ("second_moment", "gradient", "angle") for who, row in pair}
        for pair in ((("predicted", a), ("measured", b)) for a, b in lines)
    ]
    return folded("The numbers", table([{"layer": i} | row for i, row in enumerate(rows)]))


def _race(race: Race) -> str:
    seeds, steps = next(iter(race.loss.values())).shape
    best = min(race.table(), key=lambda row: row.final if row.final == row.final else float("inf"))
    seen = (
        f"{len(race.loss)} plans, {seeds} seeds, {steps} steps from random init without warm-up; band: all "
        f"seeds. Lowest at the end is {best.plan:.60}, {best.final:.3g} nats per byte; dotted is the entropy of the "
        "text's bytes."
    )
    diverged = [row.plan for row in race.table() if row.diverged]
    seen += f" {listed(diverged)} diverged in a seed or more, where the line ends." if diverged else ""
    drawn = picture(svg(pictures.race_picture(race), "race"), seen, "lab.race(plans)", "Training loss by step")
    return section("A race of plans", drawn, table(race.table()))


def _off(share: float) -> str:
    return f"{share:.1%}" if share == share else "not finite"


def _dtype(model: Llama) -> str:
    return str(model.tok_embeddings.weight.dtype).removeprefix("torch.")


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return repr(tokenizer.decode(ids, skip_special_tokens=False))
