"""Which norms of a model can go: whose gain folds, whose statistic a later norm cancels, and what the others cost."""

from dataclasses import dataclass
from typing import Any

from llama_mini.errors import RequestError
from llama_mini.lab.ablation import AblatedNorm, ablate
from llama_mini.lab.paths import readers, slots
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.validate import check_number

_IGNORE = ("rms", "scale", "l2", "prms", "crms", "group", "layer")  # kinds that a factor of their input does not change
_DIVIDE = ("rms", "scale", "l2", "prms", "crms", "power")  # that only divide each vector by one number, but for gain


@dataclass(frozen=True)
class AuditedNorm:
    """What can be done without one norm.

    folds: the matrices that can absorb its gain, as `fold` does; None if none can.
    cancels: the later norms that cancel its statistic: each token's division by its own number reaches nothing but
        them, and they divide it out again, but for eps. Its gain is still needed, and may fold. None if none do.
    without: how it was taken away: "frozen", the division by a constant, which folds as a gain does, or "skipped" for
        a kind that cannot be frozen.
    dloss, se, kl, top1, error: what that costs, as in AblatedNorm.
    can_go: whether dloss + 2·se is at most `most`.
    """

    path: str
    kind: str
    folds: str | None
    cancels: str | None
    without: str
    dloss: float
    se: float
    kl: float
    top1: float
    can_go: bool
    error: str | None


def audit(model: Llama, ids: Ids, most: float = 0.01) -> Table[AuditedNorm]:
    """A row for each norm, in the order of the forward pass: whether it folds, cancels or can go, and at what cost.

    most: nats per token that a norm that can go may cost, with two standard errors.

    The costs are those of one norm at a time. Source of folding and cancelling: Graef et al. 2024, "FlashNorm".

    Raises RequestError for a model without norms, and as `ablate` does.
    """
    check_number("most", most, RequestError, minimum=0)
    norms = {path: norm for path, norm in slots(model).items() if isinstance(norm, Norm)}
    if not norms:
        raise RequestError("the model has no norms to audit")
    ways = {path: "frozen" if norm.kind in ("rms", "scale") else "skipped" for path, norm in norms.items()}
    costs: dict[str, AblatedNorm] = {}
    settings: dict[str, dict[str, Any]]
    settings = {"frozen": {"freeze": "quadratic", "keep": "none"}, "skipped": {"skip": True}}
    for way in settings:
        if paths := [path for path in norms if ways[path] == way]:
            costs |= {row.path: row for row in ablate(model, ids, paths, **settings[way])}
    rows = []
    for path, norm in norms.items():
        folds = [name.removesuffix(".weight").rpartition(".")[2] for name in readers(path, model.config)]
        cost = {name: value for name, value in vars(costs[path]).items() if name != "kept"}
        can_go = cost["dloss"] + 2 * cost["se"] <= most
        texts = [", ".join(names) or None for names in (folds if norm.weight is not None else [], cancels(model, path))]
        rows.append(
            AuditedNorm(kind=norm.kind, folds=texts[0], cancels=texts[1], without=ways[path], can_go=can_go, **cost)
        )
    return Table(rows)


def cancels(model: Llama, path: str) -> list[str]:
    """The later norms that cancel the statistic of the norm at `path`; none if it also reaches anything else."""
    config, (branch, _, slot) = model.config, path.rpartition(".")
    at, parallel, out = branch.rpartition(".")[2], config.norm_plan.parallel, f"{branch}.out_norm"
    later: list[str] = []
    if path == f"layers.{config.n_layers - 1}.feed_forward.post_norm" and not parallel:
        later = ["norm"]
    elif (at, slot) == ("attention", "pre_norm") and not config.qkv_bias and not parallel:
        later = [f"{branch}.{name}_norm" for name in "qkv"]
    elif slot == "mid_norm" and not (config.o_bias if at == "attention" else config.mlp_bias):
        later = [out]
    elif at == "feed_forward" and slot in ("pre_norm", "gate_norm", "up_norm") and not config.mlp_bias:
        later = _after_projections(model, branch, slot)
    norm = model.get_submodule(path)
    divides = isinstance(norm, Norm) and norm.kind in _DIVIDE
    return later if divides and all(_ignores_size(model, other) for other in later) else []


def _after_projections(model: Llama, branch: str, slot: str) -> list[str]:
    """The norms to which a factor comes next: a factor of what a feed-forward layer reads, or of what gate or up gives.

    None if the factor changes what the activation does.
    """
    names = ("gate", "up") if model.config.gated_mlp else ("up",)
    reached = [f"{branch}.{name}_norm" for name in names] if slot == "pre_norm" else []
    later = [path for path in reached if isinstance(model.get_submodule(path), Norm)]
    left = [path for path in reached or [f"{branch}.{slot}"] if path not in later]
    if f"{branch}.{names[0]}_norm" in left and model.config.activation != "relu2":  # relu(s·x)² = s²·relu(x)²
        return []
    mid = f"{branch}.mid_norm"
    return later + [mid if isinstance(model.get_submodule(mid), Norm) else f"{branch}.out_norm"] * bool(left)


def _ignores_size(model: Llama, path: str) -> bool:
    norm = model.get_submodule(path)
    return isinstance(norm, Norm) and norm.kind in _IGNORE
