"""The report: the lab's results for one model and one text, as one HTML file."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

import llama_mini
from llama_mini.errors import ConfigError, RequestError
from llama_mini.lab.ablation import AblatedNorm, Base, SkippedLayer
from llama_mini.lab.attention_heads import attention
from llama_mini.lab.diagnosis import doctor
from llama_mini.lab.freezing import FREEZABLE
from llama_mini.lab.massive_activations import MASSIVE, lives
from llama_mini.lab.measurement import init
from llama_mini.lab.norm_table import norms
from llama_mini.lab.paths import select, select_layers
from llama_mini.lab.recording import Recording, capture
from llama_mini.lab.reporting import figures, plan_figures, style
from llama_mini.lab.reporting.diagram import diagram, layer_kinds, ranges
from llama_mini.lab.reporting.explorer import KEEPS, explore
from llama_mini.lab.reporting.style import check_drawable, svg, write_whole
from llama_mini.lab.study import label, progress
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.lab.theory import Profile, predict
from llama_mini.lab.training import Race
from llama_mini.machine import dtype_name
from llama_mini.model.llama import Llama
from llama_mini.model.norm_plan import NormPlan
from llama_mini.tokenizer import Tokenizer
from llama_mini.validate import join_names

_TEMPLATE = "report.html.jinja"
_COMMAND = "python -m llama_mini.lab"
_MOST_TOKENS = 12
_DIM, _SEEDS = 256, 3  # of the random models
T = TypeVar("T")


@dataclass(frozen=True)
class Shell:
    """The options that name the model and the text on the lab's command line."""

    model: str
    text: str


def report(
    path: str | Path,
    model: Llama,
    ids: Ids,
    *,
    calibrate: Ids | None = None,
    tokenizer: Tokenizer | None = None,
    name: str = "a model",
    race: Race | None = None,
    shell: Shell | None = None,
) -> Path:
    """Writes one HTML file that needs no network, and whose numbers can be read without its script. Returns its path.

    ids: the texts, (T,), (B, T) or a list. Each norm costs up to three forward passes over them, from its layer on,
        and each layer one; all activations of one pass are held at once.
    calibrate: other texts, whose constants of each norm are shown beside those of `ids`.
    tokenizer: to show tokens as text.
    name: of the checkpoint, for the title.
    race: short trainings, whose curves are added.
    shell: the options of the command line. With it each caption shows the command that made the picture, without it
        the Python call.

    Raises RequestError for ids that the model cannot read, a file that cannot be written, or without matplotlib.
    """
    target = Path(path)
    texts, other = as_texts(model, ids), None if calibrate is None else as_texts(model, calibrate)
    check_drawable(target)
    frozen = [row.path for row in norms(model) if row.kind in FREEZABLE]
    layers = {path: [path] for path in select_layers(model, "layers.*")}
    data: dict[str, Any] = {}
    sections: dict[str, Callable[[], Any]] = {
        "base": lambda: Base(model, texts),
        "facts": lambda: _facts(data["base"], other, tokenizer, name),
        "plan": lambda: _plan(model),
        "frozen": lambda: _frozen(_counted(data["base"].frozen(frozen, KEEPS), bar)),
        "watched": lambda: _watched(model, texts, other, data["frozen"], tokenizer),
        "costs": lambda: _costs(model, data["frozen"]["first"]),
        "gains": lambda: _gains(model),
        "layers": lambda: _layers(_counted(data["base"].skipped(layers), bar)),
        "findings": lambda: doctor(model, texts),
        "init": lambda: _init(model),
        "race": lambda: race and _race(race),
    }
    with progress(total=len(sections) + len(frozen) + len(model.layers), desc="report", unit="step") as bar:
        for key, section in _counted(sections.items(), bar):
            data[key] = section()
    page = _template().render(data, title=f"The norms of {name}", shell=shell)
    write_whole(target, page.encode(errors="replace"))
    return target


def _template() -> Any:
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.policies["json.dumps_kwargs"] = {"allow_nan": False}  # not sorted: facts have an order
    env.filters |= {"fmt": format, "number": _number, "share": _share, "records": _records}
    return env.get_template(_TEMPLATE, globals={"command": _COMMAND, "style": style, "massive_ratio": MASSIVE})


def _counted(rows: Iterable[T], bar: Any) -> Iterator[T]:
    """The rows, each of which is a step on the progress bar once it is used."""
    for row in rows:
        yield row
        bar.update()


def _records(rows: Table[Any]) -> list[dict[str, Any]]:
    return [{name: getattr(row, name) for name in rows.shown()} for row in rows]


def _number(value: float) -> str:
    """Four significant digits, or a whole number with commas."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _share(value: float) -> str:
    return f"{value:.1%}" if value == value else "not finite"


# --- the sections: what the template needs for each ---


def _facts(base: Base, other: Texts | None, tokenizer: Tokenizer | None, name: str) -> dict[str, str]:
    model, score = base.model, base.score
    config = model.config
    return {
        "model": name,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, {dtype_name(model.dtype)}",
        "shape": f"{config.n_layers} layers, dim {config.dim}, hidden {config.hidden_dim}, {config.n_heads} heads of "
        f"{config.head_dim}, {config.n_kv_heads} KV heads, vocabulary {config.vocab_size:,}",
        "norms": f"{config.norm_plan.name(config.n_layers)}: {len(norms(model))}",
        "text": _read(base.texts, tokenizer),
        "loss on it": f"{score.loss:.4f} nats per token, perplexity {score.perplexity:.4g}",
        **({} if other is None else {"other text": _read(other, tokenizer)}),
        "made by": f"llama_mini {llama_mini.__version__}, torch {torch.__version__}",
    }


def _read(texts: Texts, tokenizer: Tokenizer | None) -> str:
    size = f"{int(texts.real.sum()):,} tokens in {len(texts.real)} row{'s' if len(texts.real) > 1 else ''}"
    return size + (f", beginning {_decode(tokenizer, texts.tokens[0][texts.real[0]][:24])}" if tokenizer else "")


def _plan(model: Llama) -> dict[str, Any]:
    plan, depth = model.config.norm_plan, model.config.n_layers
    kinds = [(kind.name, ranges(kind.layers)) for kind in layer_kinds(plan, depth)]
    return {"depth": depth, "kinds": kinds, "columns": diagram(model.config)}


def _frozen(rows: Iterable[list[AblatedNorm]]) -> dict[str, Table[AblatedNorm]]:
    """By the tokens that are kept apart, the costs of freezing each norm that can be frozen."""
    of_norms = list(rows)
    return {keep: Table([costs[i] for costs in of_norms]) for i, keep in enumerate(KEEPS)}


def _watched(
    model: Llama, texts: Texts, other: Texts | None, frozen: dict[str, Table[AblatedNorm]], tokenizer: Tokenizer | None
) -> Any:
    """The data of the explorer, on the residual stream, and on its massive elements."""
    recording, of_other = capture(model, texts), None if other is None else capture(model, other, keep="stats")
    costs = {keep: {row.path: row for row in rows} for keep, rows in frozen.items()}
    explorer = explore(model, recording, of_other, costs, attention(model, texts), tokenizer)
    return explorer, *_activations(recording, tokenizer)


def _activations(recording: Recording, tokenizer: Tokenizer | None) -> tuple[Any, Any]:
    ends = recording.resid.resid_pre[0], recording.resid.resid_post[-1]
    first, last = (point.median for point in ends)
    stream = {"svg": svg(figures.residual_rms_picture(recording), "rms"), "first": first, "last": last}
    life = lives(recording.massive(), recording.texts.tokens, tokenizer)
    massive = {
        "svg": svg(figures.massive_picture(recording), "massive"),
        "tokens": len(life),
        "most": _MOST_TOKENS,
        "lives": Table(life[:_MOST_TOKENS]),
    }
    return stream, massive


def _costs(model: Llama, rows: Table[AblatedNorm]) -> dict[str, Any]:
    if not len(rows):
        return {"rows": rows, "kinds": " or ".join(FREEZABLE)}
    paths = rows.column("path")
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in paths))
    return {
        "svg": svg(figures.norm_cost_picture(rows), "cost"),
        "rows": rows,
        "errors": sum(row.error is not None for row in rows),
        "worst": max((row for row in rows if row.error is None), key=lambda row: row.dloss, default=None),
        "free": sum(abs(row.dloss) <= 2 * row.se for row in rows),
        "others": len(norms(model)) - len(rows),
        "pattern": shlex.quote(",".join(patterns)) if select(model, patterns) == paths else "",
    }


def _gains(model: Llama) -> dict[str, Any]:
    rows = norms(model)
    with_gain = [row for row in rows if row.mean is not None]
    in_layers = any(row.path.startswith("layers.") for row in with_gain)
    return {
        "with_gain": with_gain,
        "of_the_model": [row for row in with_gain if "." not in row.path],
        "svg": svg(figures.gain_picture(rows), "gain") if in_layers else "",
    }


def _layers(skipped: Iterable[SkippedLayer]) -> dict[str, Any]:
    rows = Table(list(skipped))
    done = sorted((row for row in rows if row.error is None), key=lambda row: row.dloss)
    return {"svg": svg(figures.skip_picture(rows), "skip"), "rows": rows, "done": done}


def _init(model: Llama) -> dict[str, Any]:
    config, depth = model.config, model.config.n_layers
    plan, activation, gated = config.norm_plan, config.activation, config.gated_mlp
    try:
        predicted = predict(plan, depth, activation, gated)
    except RequestError as error:
        return {"why_not": str(error)}
    measured = init(plan, depth, dim=_DIM, seeds=_SEEDS, activation=activation, gated=gated)
    options = "" if activation == "silu" else f" --activation {activation}"
    options += "" if gated else " --no-gate"
    name = plan.name(depth)
    try:
        NormPlan.parse(name, depth)
    except ConfigError:  # a plan that is no preset
        name = label(plan)
    sizes = f"--depth {depth} --dim {_DIM} --seeds {_SEEDS}{options}"
    return {
        "why_not": "",
        "svg": svg(plan_figures.init_picture(predicted, measured), "init"),
        "depth": depth,
        "dim": _DIM,
        "seeds": _SEEDS,
        "command": f"{_COMMAND} init {shlex.quote(name)} {sizes} --picture init.svg",
        "off": measured.deviation(predicted),
        "rows": _side_by_side(predicted, measured),
    }


def _side_by_side(predicted: Profile, measured: Profile) -> list[dict[str, Any]]:
    pairs = [{"predicted": a, "measured": b} for a, b in zip(predicted.table(), measured.table(), strict=True)]
    names = ("second_moment", "gradient", "angle")
    return [
        {"layer": i} | {f"{name} {who}": getattr(row, name) for name in names for who, row in pair.items()}
        for i, pair in enumerate(pairs)
    ]


def _race(race: Race) -> dict[str, Any]:
    rows, (seeds, steps) = race.table(), next(iter(race.loss.values())).shape
    return {
        "svg": svg(plan_figures.race_picture(race), "race"),
        "rows": rows,
        "seeds": seeds,
        "steps": steps,
        "rate": race.learning_rate,
        "best": min(rows, key=lambda row: row.final if row.final == row.final else float("inf")),
        "diverged": join_names(row.plan for row in rows if row.diverged),
        "plans": shlex.join(label(plan) for plan in race.loss),
    }


def _decode(tokenizer: Tokenizer, ids: Tensor) -> str:
    return repr(tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=False))
