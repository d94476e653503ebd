"""The norms of one residual branch, as data. A slot is a place where a norm may sit; the README draws all nine."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import nn

from llama_mini.errors import ConfigError
from llama_mini.model.norm import NORMS, Cast, Gain, Norm
from llama_mini.validate import check_choice, check_flag, check_number, short_repr

View = Literal["head", "full"]
SLOTS = ("pre", "q", "k", "v", "gate", "up", "mid", "out", "post")
HEAD_SLOTS = ("q", "k", "v")
ONLY_IN = dict.fromkeys(HEAD_SLOTS, "attention") | {"gate": "feed_forward", "up": "feed_forward"}  # slot -> branch


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """One norm, as data.

    kind: rms, layer, scale, l2, prms, crms, group, power, frozen, dyt or derf: a class of norm.py.
    eps: None takes the config's `norm_eps`.
    gain, cast, scale, bias, groups, power: as in Norm.
    view: in slots q, k and v only: `head` norms each head (Qwen 3), `full` the whole projection (OLMo 2).
    """

    kind: str = "rms"
    eps: float | None = None
    gain: Gain = "w"
    cast: Cast = "early"
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    power: float = 1.0
    view: View = "head"

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in NORMS:
            raise ConfigError(f"norm plan: unknown kind {short_repr(self.kind)}; known: {', '.join(NORMS)}, none")
        check_choice("norm plan view", self.view, get_args(View), ConfigError)
        self.build(self.groups, norm_eps=0.0)  # the norm's constructor checks the rest

    def build(self, dim: int, norm_eps: float) -> Norm:
        """The norm module, over `dim` elements."""
        eps = norm_eps if self.eps is None else self.eps
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("kind", "eps", "view")}
        return NORMS[self.kind](dim, eps, **settings)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind} | {k: v for k, v in vars(self).items() if v != getattr(NormSpec, k)}

    @staticmethod
    def from_dict(data: Any, where: str) -> "NormSpec | None":
        """The inverse of `to_dict`. null and {"kind": "none"} mean an empty slot."""
        return None if data in (None, {"kind": "none"}) else NormSpec(**known_keys(data, NormSpec, where))


def build_norm(spec: NormSpec | None, dim: int, norm_eps: float) -> nn.Module:
    """The norm of a slot. An empty slot is an identity: it has an address and costs nothing."""
    return nn.Identity() if spec is None else spec.build(dim, norm_eps)


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """The norms of one residual branch, and the residual scales: post(α·x + β·out(branch(pre(x)))).

    learned: whether α and β are parameters that start at these values, as in SkipInit (De & Smith 2020).
    """

    pre: NormSpec | None = None
    q: NormSpec | None = None
    k: NormSpec | None = None
    v: NormSpec | None = None
    gate: NormSpec | None = None
    up: NormSpec | None = None
    mid: NormSpec | None = None
    out: NormSpec | None = None
    post: NormSpec | None = None
    alpha: float = 1.0
    beta: float = 1.0
    learned: bool = False

    def __post_init__(self) -> None:
        for slot in SLOTS:
            check_slot(slot, getattr(self, slot), head=slot in HEAD_SLOTS)
        for name in ("alpha", "beta"):
            check_number(f"norm plan: {name}", getattr(self, name), ConfigError)
        check_flag("norm plan: learned", self.learned, ConfigError)

    def to_dict(self) -> dict[str, Any]:
        norms = {slot: getattr(self, slot).to_dict() for slot in SLOTS if getattr(self, slot) is not None}
        scales = {name: getattr(self, name) for name in ("alpha", "beta", "learned")}
        return norms | {name: value for name, value in scales.items() if value != getattr(BranchPlan, name)}

    @staticmethod
    def from_dict(data: Any, where: str) -> "BranchPlan":
        parts = known_keys(data, BranchPlan, where)
        return BranchPlan(**parts | {s: NormSpec.from_dict(parts[s], f"{where}.{s}") for s in SLOTS if s in parts})


def check_slot(slot: str, spec: Any, head: bool) -> None:
    """Raises ConfigError for anything but a NormSpec or None, and for a `view` in a slot without heads."""
    if spec is None:
        return
    if not isinstance(spec, NormSpec):
        raise ConfigError(f"norm plan: slot {slot} takes a NormSpec or None, not {short_repr(spec)}")
    if spec.view != "head" and not head:
        raise ConfigError(f"norm plan: view={spec.view!r} belongs to the slots q, k and v, not to {slot}")


def known_keys(data: Any, cls: type, where: str) -> dict[str, Any]:
    """A JSON object as a dict. Raises ConfigError for a key that is not a field of `cls`."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"norm plan, {where}: expected an object, found {short_repr(data)}")
    names = {f.name for f in fields(cls)}
    if unknown := [str(key) for key in data if key not in names]:
        known = ", ".join(sorted(names))
        raise ConfigError(f"norm plan, {where}: unknown {', '.join(sorted(unknown))}; known: {known}")
    return dict(data)
