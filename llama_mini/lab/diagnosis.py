"""The doctor: looks for likely problems of the norms of a checkpoint or a model."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.families import FAMILIES, OWN
from llama_mini.checkpoint.gguf.metadata import shortest
from llama_mini.checkpoint.io.files import CONFIG, PARAMS, inside, read_json
from llama_mini.checkpoint.keys import to_file_name
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.match import empty_model
from llama_mini.checkpoint.open import open_checkpoint, resolve
from llama_mini.checkpoint.source import Source
from llama_mini.errors import ConfigError, LlamaMiniWarning
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import slots
from llama_mini.lab.recording import watched
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm, PartialRMSNorm
from llama_mini.validate import join_names

Severity = Literal["error", "warning", "note"]
_USUAL_EPS = (1e-5, 1e-6)
_GLM = (1e-5, 1.5625e-7)
_USUAL_EPS_OF = {"qwen3": (1e-6,), "glm": _GLM, "glm4": _GLM}  # every other family has published checkpoints with both
_LARGEST, _SMALLEST = 65504.0, 2.0**-14  # float16's largest and smallest normal numbers
_MARGIN = 2  # values this factor from the limits are reported too: another text has other extremes
_JUDGED = ("pre_norm", "mid_norm", "out_norm", "post_norm")  # not final, q, k and v norms: their gains exceed one

# Limits for the median over the norms of one slot, since a single norm may be nearly dead. Training starts at a gain of
# one and seldom crosses zero. In the default checkpoint the median share of gains below zero is 0 (0.47 in one norm),
# and 1 once one is subtracted; the median of the lowest hundredth is 0.1, and 1.1 once one is added.
_MOST_BELOW_ZERO = 0.1
_LOWEST_HUNDREDTH, _LEAST_MEAN = 0.95, 1.1
_MOST_LOWEST = 2  # gains that start beyond it, as Gemma 3's do, do not become likely ones when one is subtracted


@dataclass(frozen=True)
class Finding:
    """severity: error (the answers are wrong), warning (they probably are, or will be in float16) or note.
    path: of a norm, a slot, a tensor or a file."""

    severity: Severity
    path: str
    finding: str
    advice: str


def doctor(subject: str | Path | Llama, ids: Ids | None = None) -> Table[Finding]:
    """Likely problems of the norms of a checkpoint (a path or hub name) or a model. An empty table means none.

    It looks for an eps that is absent, zero or unusual for the family; for norm tensors that are missing, or that no
    norm reads; for gains that are NaN, infinite, huge, all zero or never trained; and for `1+w` gains read as `w`, or
    the reverse. With the token ids of texts, (T,), (B, T) or a list, it also looks for inputs of norms that are small
    beside eps, or that float16 cannot hold. Without a text, only the headers and norms of a checkpoint are read.

    Raises CheckpointError if there is no checkpoint; RequestError for ids that the model cannot read.
    """
    if isinstance(subject, Llama):
        norms = _norms(subject)
        findings = [*_eps(norms, subject.config.norm_eps, "config", ""), *_gains(norms)]
        return _with_text(findings, lambda: subject, ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*norm_eps is absent", LlamaMiniWarning)  # reported as a finding
        try:
            source = open_checkpoint(resolve(subject))
        except ConfigError as error:
            advice = "correct the configuration: the checkpoint cannot be opened without it"
            return Table([Finding("error", str(subject), str(error), advice)])
    return _with_text(_of_source(source), lambda: load_model(Llama, source, torch.float32, "cpu"), ids)


def _with_text(rows: list[Finding], load: Callable[[], Llama], ids: Ids | None) -> Table[Finding]:
    """The findings, and if there is a text and the model can run, those on the inputs of its norms."""
    if ids is None or any(row.severity == "error" for row in rows):
        return Table(rows)
    model = load()
    return Table(rows + _measured(model, as_texts(model, ids)))


def _of_source(source: Source) -> list[Finding]:
    model = empty_model(Llama, source)
    norms, shapes = _norms(model), {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = {to_file_name(name, source.keys): name for name in shapes}
    of_norms = {theirs: ours for theirs, ours in names.items() if ours.rpartition(".")[0] in norms}
    read = [
        name for name in source.tensors if name in of_norms and source.tensors[name].shape == shapes[of_norms[name]]
    ]
    findings = []
    if unread := sorted(name for name in source.tensors if "norm" in name.lower() and name not in names):
        what = f"no norm of model_type {source.model_type} reads it"
        advice = "model_type or the file belongs to another model: compare both with the origin"
        findings += [Finding("error", join_names(unread), what, advice)]
    if missing := sorted(set(of_norms) - set(read)):
        what = f"a norm of model_type {source.model_type} needs it, and the file lacks it or has another shape"
        advice = "fetch the file from its origin again, or correct model_type"
        findings += [Finding("error", join_names(missing), what, advice)]
    for name, _, values in source.read(read, torch.float32, whole=True):
        path, _, leaf = of_norms[name].rpartition(".")
        setattr(norms[path], leaf, nn.Parameter(values, requires_grad=False))
    has_config = inside(source.directory, CONFIG).is_file()
    config_file = source.path if source.gguf is not None else source.directory / (CONFIG if has_config else PARAMS)
    eps = _absent_eps(config_file, source) or _eps(norms, source.config.norm_eps, str(config_file), source.model_type)
    return [*eps, *findings, *_gains(norms)]


def _absent_eps(file: Path, source: Source) -> list[Finding]:
    if source.gguf is not None:
        return []  # such a file does not open
    own = file.name == PARAMS or source.model_type == OWN
    key = "norm_eps" if own else FAMILIES[source.model_type].eps
    if key is None or read_json(file).get(key) is not None:
        return []
    what = f"{key} is absent; {source.config.norm_eps:g} is assumed"
    return [Finding("warning", str(file), what, "write the eps that the model was trained with")]


def _norms(model: Llama) -> dict[str, Norm]:
    return {path: module for path, module in slots(model).items() if isinstance(module, Norm)}


def _eps(norms: Mapping[str, Norm], of_config: float, config: str, family: str) -> Iterator[Finding]:
    with_eps = {path: norm.eps for path, norm in norms.items() if norm.has_eps}
    usual = _USUAL_EPS_OF.get(family, _USUAL_EPS)
    for eps in sorted(set(with_eps.values())):
        where = config if eps == of_config else join_names(path for path, other in with_eps.items() if other == eps)
        short = shortest(eps)
        if eps == 0:
            yield Finding("warning", where, "eps is 0: a row of zeros becomes NaN", f"set {_either(usual)}")
        elif short not in usual:
            of = f" for model_type {family}" if family else ""
            what = f"eps is {eps!r}; usual{of} is {_either(usual)}"
            yield Finding("warning", where, what, "compare it with the origin's config.json")
        elif short != eps:
            what = f"eps is {eps!r}, which is {short:g} rounded to float32"
            yield Finding("note", where, what, f"write {short:g}")


def _either(values: Iterable[float]) -> str:
    return " or ".join(f"{value:g}" for value in values)


def _gains(norms: Mapping[str, Norm]) -> Iterator[Finding]:
    effective = {path: effective_gain(norm) for path, norm in norms.items()}
    gains = {path: gain for path, gain in effective.items() if gain is not None and not gain.is_meta}  # meta: missing
    broken = {path for path, gain in gains.items() if not torch.isfinite(gain).all()}
    for path in broken:
        n_bad = int((~torch.isfinite(gains[path])).sum())
        what = f"{n_bad} of {gains[path].numel()} gains are NaN or infinite"
        yield Finding("error", path, what, "fetch the file from its origin again, or convert it in a wider dtype")
    gains = {path: gain for path, gain in gains.items() if path not in broken}
    for path, gain in gains.items():
        yield from _extreme(path, norms[path], gain)
    untrained = [path for path, gain in gains.items() if (gain == 1).all()]
    if untrained and len(untrained) == len(gains):
        what = "all gains are exactly 1: never trained, or folded"
        yield Finding("note", "every norm", what, "nothing to do if that is intended")
    elif untrained:
        what = "all its gains are exactly 1, while other norms are trained"
        advice = "check whether its weight was lost in a conversion, or folded"
        yield Finding("warning", join_names(untrained), what, advice)
    yield from _conventions(norms, {path: gain for path, gain in gains.items() if path not in untrained})


def _extreme(path: str, norm: Norm, gain: Tensor) -> Iterator[Finding]:
    if not gain.any():
        yield Finding("error", path, "all its gains are 0, so its output is 0", "check whether `1+w` was meant")
    bounded = norm.kind not in ("frozen", "power")
    # The largest element of a normed row.
    longest = 1.0 if norm.kind in ("l2", "dyt", "derf") else math.sqrt(norm.dim / norm.groups)
    if bounded and (reach := float(gain.abs().max()) * longest * abs(norm.scale)) > _LARGEST:
        what = f"a gain of {float(gain.abs().max()):.4g} can give outputs of {reach:.3g}; float16 ends at {_LARGEST:g}"
        yield Finding("warning", path, what, "compare the weight with its origin; do not run it in float16")


def _conventions(norms: Mapping[str, Norm], gains: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Gains read as `w` but stored as `1+w`, or the reverse: one finding per slot, since a single norm says little."""
    by_slot: dict[tuple[str, str], list[str]] = {}
    for path in gains:
        slot = ".".join(path.split(".")[2:])
        if slot.endswith(_JUDGED):
            by_slot.setdefault((slot, norms[path].gain), []).append(path)
    for (slot, read_as), paths in by_slot.items():
        of_slot = [gains[path] for path in paths]
        below_zero = statistics.median(float((gain < 0).float().mean()) for gain in of_slot)
        lowest = statistics.median(float(gain.quantile(0.01)) for gain in of_slot)
        mean = statistics.median(float(gain.mean()) for gain in of_slot)
        if below_zero > _MOST_BELOW_ZERO:
            what = f"read as `{read_as}`, {below_zero:.0%} of a typical norm's gains are below 0: 1 seems to be missing"
            advice = "set the plan's gain to `1+w`" if read_as == "w" else "add 1 to the weights: they lack it twice"
        elif _LOWEST_HUNDREDTH < lowest < _MOST_LOWEST and mean > _LEAST_MEAN:
            what = f"read as `{read_as}`, a typical norm's gains start at {lowest:.2f}: 1 seems to be added twice"
            advice = "set the plan's gain to `w`" if read_as == "1+w" else "subtract 1: a converter has added it"
        else:
            continue
        yield Finding("warning", f"layers.*.{slot}", what, advice)


@dataclass
class _Seen:
    """The extremes of one norm's input and output over a text."""

    moment: float = math.inf  # the smallest number that eps is added to
    smallest: float = math.inf  # RMS of a row
    largest: float = 0.0  # element
    finite: bool = True


def _measured(model: Llama, texts: Texts) -> list[Finding]:
    norms = _norms(model)
    seen = {path: _Seen() for path in norms}

    def record(path: str, x: Tensor, y: Tensor) -> None:
        x, y = x[texts.real], y[texts.real]
        norm, wide = seen[path], x.to(torch.promote_types(x.dtype, torch.float32))
        norm.moment = min(norm.moment, float(_moment(norms[path], wide).min()))
        norm.smallest = min(norm.smallest, float(wide.pow(2).mean(-1).sqrt().min()))
        norm.largest = max(norm.largest, float(x.abs().max()), float(y.abs().max()))
        norm.finite &= bool(x.isfinite().all() and y.isfinite().all())

    with watched(norms, record), torch.inference_mode():
        model(texts.tokens)
    return [finding for path, norm in norms.items() for finding in _risks(path, norm, seen[path])]


def _moment(norm: Norm, x: Tensor) -> Tensor:
    """The number that eps is added to, for each row."""
    if norm.kind == "layer":
        return x.var(-1, correction=0)
    if norm.kind == "group":
        x = x.unflatten(-1, (norm.groups, -1))
    if norm.kind == "crms":
        return (x.pow(2).sum(-1) + x.sum(-1).pow(2)) / (norm.dim + 1)
    if isinstance(norm, PartialRMSNorm):
        x = x[..., : max(1, round(norm.dim * norm.share))]
    return x.pow(2).sum(-1) if norm.kind == "l2" else x.pow(2).mean(-1)


def _risks(path: str, norm: Norm, seen: _Seen) -> Iterator[Finding]:
    if not seen.finite:
        advice = "run in bfloat16 or float32, and look at the norms before it"
        yield Finding("error", path, "it reads or returns NaN or infinity", advice)
        return
    if norm.has_eps and seen.moment < norm.eps:
        kept = math.sqrt(seen.moment / (seen.moment + norm.eps))
        what = f"eps {norm.eps:g} exceeds its input's mean square, {seen.moment:.3g}: {kept:.0%} of a row is left"
        yield Finding("warning", path, what, "compare eps with the origin's config.json")
    if seen.largest * _MARGIN > _LARGEST:
        what = f"it reads or returns {seen.largest:,.0f}; float16 ends at {_LARGEST:,.0f}"
        yield Finding("warning", path, what, "run in bfloat16 or float32")
    if seen.smallest < _SMALLEST * _MARGIN:
        what = f"an input of RMS {seen.smallest:.3g} underflows in float16"
        yield Finding("warning", path, what, "run in bfloat16 or float32")
