"""Where the norms of a whole model sit, as data; norm_slots.py has the slots of one branch.

`NormPlan.parse("out+qk:full", n_layers)` makes a plan from a preset; `to_dict` and `from_dict` are its JSON form.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llama_mini.errors import ConfigError
from llama_mini.model.norm import NORMS
from llama_mini.model.norm_slots import ONLY_IN, SLOTS, BranchPlan, NormSpec, check_slot, known_keys
from llama_mini.validate import check_flag, is_whole, short_repr

BRANCHES = ("attention", "feed_forward")
_NOTES: dict[tuple[str, Any], str] = {  # what `NormPlan.name` says of a setting that all norms share
    **{("kind", kind): f"of kind {kind}" for kind in NORMS if kind != NormSpec.kind},
    ("gain", "1+w"): "with gain 1+w",
    ("gain", "none"): "without a gain",
    ("bias", True): "with a bias",
    ("cast", "late"): "rounded last",
}


@dataclass(frozen=True, kw_only=True)
class Override:
    """Branches that replace those of the plan in layers `first` to `last`, both included."""

    first: int
    last: int
    attention: BranchPlan | None = None
    feed_forward: BranchPlan | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.first) or not is_whole(self.last) or not 0 <= self.first <= self.last:
            raise ConfigError(f"norm plan: override of layers {self.first}-{self.last} is not a range")
        for name in BRANCHES:
            if getattr(self, name) is not None:
                _check_branch(name, getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        branches = {name: getattr(self, name).to_dict() for name in BRANCHES if getattr(self, name) is not None}
        return {"layers": f"{self.first}-{self.last}"} | branches

    @staticmethod
    def from_dict(data: Any) -> "Override":
        layers = data.get("layers") if isinstance(data, Mapping) else None
        span = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", layers) if isinstance(layers, str) else None
        if span is None:
            raise ConfigError(f"norm plan: an override needs layers such as '0-2' or '5', found {short_repr(data)}")
        if unknown := sorted(str(key) for key in data if key not in ("layers", *BRANCHES)):
            raise ConfigError(f"norm plan, layers {layers}: unknown {', '.join(unknown)}; known: {', '.join(BRANCHES)}")
        branches = {name: BranchPlan.from_dict(data[name], name) for name in BRANCHES if name in data}
        return Override(first=int(span[1]), last=int(span[2] or span[1]), **branches)


@dataclass(frozen=True, kw_only=True)
class NormPlan:
    """Where the norms of a model sit, whether its weights come from a checkpoint, a random start or training.

    parallel: both branches of a layer read x, by attention's pre norm, and both outputs are added to x (Cohere 2).
    """

    attention: BranchPlan = field(default_factory=BranchPlan)
    feed_forward: BranchPlan = field(default_factory=BranchPlan)
    embed: NormSpec | None = None
    final: NormSpec | None = field(default_factory=NormSpec)
    parallel: bool = False
    overrides: tuple[Override, ...] = ()  # where two name the same layer, the later one wins

    def __post_init__(self) -> None:
        for name in BRANCHES:
            _check_branch(name, getattr(self, name))
        for name in ("embed", "final"):
            check_slot(name, getattr(self, name), head=False)
        check_flag("norm plan: parallel", self.parallel, ConfigError)
        if not isinstance(self.overrides, tuple) or not all(isinstance(o, Override) for o in self.overrides):
            raise ConfigError(f"norm plan: overrides must be a tuple of Override, not {short_repr(self.overrides)}")

    def layer(self, index: int) -> tuple[BranchPlan, BranchPlan]:
        """The plans of layer `index`: attention, feed-forward."""
        attention, feed_forward = self.attention, self.feed_forward
        for override in self.overrides:
            if override.first <= index <= override.last:
                attention = override.attention or attention
                feed_forward = override.feed_forward or feed_forward
        return attention, feed_forward

    def with_layers(self, layers: Sequence[tuple[BranchPlan, BranchPlan]]) -> "NormPlan":
        """The plan whose layer `i` is `layers[i]` (attention, feed-forward); embed and final stay.

        Equal layers always make an equal plan. The most common branch (on a tie, the one that occurs last) becomes the
        default of all layers. Neighbouring layers that differ from it in the same way share one override.
        """
        defaults: dict[str, Any] = {
            name: Counter(reversed(branches)).most_common(1)[0][0]  # on a tie, the one counted first
            for name, branches in zip(BRANCHES, zip(*layers, strict=True), strict=True)
        }
        overrides: list[Override] = []
        for i, branches in enumerate(layers):
            differs = {name: b for name, b in zip(BRANCHES, branches, strict=True) if b != defaults[name]}
            override = Override(first=i, last=i, **differs)
            if overrides and overrides[-1] == replace(override, first=overrides[-1].first, last=i - 1):
                overrides[-1] = replace(override, first=overrides[-1].first)
            elif differs:
                overrides.append(override)
        return replace(self, **defaults, overrides=tuple(overrides))

    def check_depth(self, n_layers: int) -> None:
        """Raises ConfigError for an override of a layer that a model of `n_layers` does not have."""
        for o in self.overrides:
            if o.last >= n_layers:
                raise ConfigError(f"norm plan: override of layers {o.first}-{o.last} in a model of {n_layers} layers")

    @staticmethod
    def parse(text: str, n_layers: int) -> "NormPlan":
        """The plan of a preset and its suffixes, such as `out+qk:full`, for a model of `n_layers`.

        Raises ConfigError that lists PRESETS and SUFFIXES for any other text.
        """
        head, *suffixes = re.split(_SUFFIX, text.strip())
        placement, settings = _FAMILIES.get(head, (head, {}))
        head, *of_family = re.split(_SUFFIX, placement)
        plan = _preset(head, n_layers)
        for suffix in (*of_family, *suffixes):
            plan = _suffix(plan, suffix, text, n_layers)
        return plan.with_norms(**settings)

    def name(self, n_layers: int) -> str:
        """The text that `parse` turns into this plan, or else its dict. Notes tell what all norms or branches share."""
        layers = [self.layer(i) for i in range(n_layers)]
        branches = [branch for layer in layers for branch in layer]
        slots = [getattr(branch, slot) for branch in branches for slot in SLOTS]
        norms = [norm for norm in (*slots, self.embed, self.final) if norm is not None]
        values = {setting: {getattr(norm, setting) for norm in norms} for setting, _ in _NOTES}
        shared = {setting: of_all.pop() for setting, of_all in values.items() if len(of_all) == 1}
        notes = [text for (setting, value), text in _NOTES.items() if shared.get(setting) == value]
        if notes and "bias" in shared and all(norm.groups == norm.power == 1 for norm in norms):
            plain = self.with_norms(**{setting: getattr(NormSpec(), setting) for setting in shared})
            return f"{plain.name(n_layers)}, each {', '.join(notes)}"
        if len(betas := {branch.beta for branch in branches}) == 1 and (beta := betas.pop()) != 1:
            plain = self.with_layers([(replace(a, beta=1.0), replace(f, beta=1.0)) for a, f in layers])
            return f"{plain.name(n_layers)}, each branch times {beta:g}"
        qk = self.attention.q and ("+qk:full" if self.attention.q.view == "full" else "+qk")
        embed = "+embed" if self.embed else ""
        n_post = sum(attention.post is not None for attention, _ in layers)
        for preset in (*PRESETS, f"mix({n_post / n_layers!r})"):
            text = preset + ("" if preset == "simple" else qk or "") + embed  # it has its own q and k norms
            plan = NormPlan.parse(text, n_layers)
            if replace(plan, final=self.final) == self and self.final in (None, plan.final):
                return text + ("" if self.final == plan.final else "-final")
        return str(self.to_dict())

    def with_norms(self, **settings: Any) -> "NormPlan":
        """The same plan with these settings (cast="late", gain="1+w", ...) in every norm."""

        def changed(value: Any) -> Any:
            if isinstance(value, NormSpec):
                return replace(value, **settings)
            if isinstance(value, NormPlan | BranchPlan | Override):
                return replace(value, **{f.name: changed(getattr(value, f.name)) for f in fields(value)})
            return tuple(map(changed, value)) if isinstance(value, tuple) else value

        return changed(self)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: empty slots and default values are left out."""
        return {
            "attention": self.attention.to_dict(),
            "feed_forward": self.feed_forward.to_dict(),
            "embed": self.embed and self.embed.to_dict(),
            "final": self.final and self.final.to_dict(),
            **({"parallel": True} if self.parallel else {}),
        } | ({"overrides": [override.to_dict() for override in self.overrides]} if self.overrides else {})

    @staticmethod
    def from_dict(data: Any) -> "NormPlan":
        """The inverse of `to_dict`. Raises ConfigError for an unknown or misplaced key."""
        data = known_keys(data, NormPlan, "top level")
        entries = data.get("overrides", [])
        if not isinstance(entries, list):
            raise ConfigError(f"norm plan: overrides must be a list, not {short_repr(entries)}")
        parts: dict[str, Any] = {name: BranchPlan.from_dict(data[name], name) for name in BRANCHES if name in data}
        parts |= {name: NormSpec.from_dict(data[name], name) for name in ("embed", "final") if name in data}
        return NormPlan(**data | parts | {"overrides": tuple(map(Override.from_dict, entries))})


def _check_branch(name: str, branch: Any) -> None:
    if not isinstance(branch, BranchPlan):
        raise ConfigError(f"norm plan: {name} takes a BranchPlan, not {short_repr(branch)}")
    for slot, only in ONLY_IN.items():
        if name != only and getattr(branch, slot) is not None:
            raise ConfigError(f"norm plan: slot {slot} exists in {only} only, not in {name}")


def _everywhere(branch: BranchPlan, **others: Any) -> NormPlan:
    return NormPlan(attention=branch, feed_forward=branch, **others)


def _lns(n_layers: int) -> NormPlan:
    scaled = [BranchPlan(pre=NormSpec(scale=layer**-0.5)) for layer in range(1, n_layers + 1)]
    return NormPlan().with_layers([(branch, branch) for branch in scaled])


def _keel(n_layers: int) -> NormPlan:  # Chen & Wei 2026, "Post-LayerNorm Is Back"; α is the number of branches
    branch = BranchPlan(pre=_RMS, post=_RMS, alpha=2.0 * n_layers)
    return NormPlan(final=None).with_layers([(_PRE, _PRE)] + [(branch, branch)] * (n_layers - 1))


_RMS, _FULL = NormSpec(), NormSpec(view="full")
_PRE, _POST = BranchPlan(pre=_RMS), BranchPlan(post=_RMS)
_BOTH, _SUB = replace(_PRE, out=_RMS), replace(_PRE, mid=_RMS)
PRESETS: dict[str, Callable[[int], NormPlan]] = {  # name -> plan for n layers; also mix(SHARE)
    "pre": lambda n: _everywhere(_PRE),  # LLaMA
    "post": lambda n: _everywhere(_POST, final=None),  # the original Transformer
    "peri": lambda n: _everywhere(_BOTH),  # Gemma 2
    "out": lambda n: _everywhere(BranchPlan(out=_RMS)),  # OLMo 2
    "none": lambda n: _everywhere(BranchPlan()),
    "deep": lambda n: _everywhere(replace(_POST, alpha=(2 * n) ** 0.25), final=None),  # DeepNorm
    "lns": _lns,  # LayerNorm Scaling: layer l divides its norm's output by √l
    "sub": lambda n: _everywhere(_SUB),  # Sub-LN
    "normformer": lambda n: NormPlan(attention=_BOTH, feed_forward=_SUB),
    "parallel": lambda n: NormPlan(attention=_PRE, parallel=True),  # Cohere 2
    "keel": _keel,  # post, the stream scaled by the number of branches, and pre; the first layer pre alone
    "simple": lambda n: NormPlan(  # SimpleNorm (Chen et al. 2026, "SimpleGPT"): on the output of every matrix
        attention=BranchPlan(q=_FULL, k=_FULL, v=_FULL, out=_RMS), feed_forward=BranchPlan(gate=_RMS, up=_RMS, out=_RMS)
    ),
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # the placement of a family, and what all its norms share
    "olmo3": ("out+qk:full", {"cast": "late"}),
    "gemma3": ("peri+qk", {"gain": "1+w", "cast": "late"}),
}
SUFFIXES = "+qk, +qk:full, +embed, -final"
_SUFFIX = r"(?=[+-])"  # begins here


def _preset(name: str, n_layers: int) -> NormPlan:
    if mix := re.fullmatch(r"mix\(\s*(\d*\.?\d+|\d+\.)\s*\)", name):  # Mix-LN: the first layers post, the rest pre
        if float(mix[1]) > 1:
            raise ConfigError(f"norm plan {name!r}: the share of layers must lie between 0 and 1")
        n_post = math.floor(float(mix[1]) * n_layers + 1e-9)
        return NormPlan().with_layers([(_POST, _POST)] * n_post + [(_PRE, _PRE)] * (n_layers - n_post))
    if name in PRESETS:
        return PRESETS[name](n_layers)
    known = ", ".join([*PRESETS, "mix(SHARE)", *_FAMILIES])
    raise ConfigError(f"norm plan: unknown preset {short_repr(name)}; known: {known}; suffixes: {SUFFIXES}")


def _suffix(plan: NormPlan, suffix: str, text: str, n_layers: int) -> NormPlan:
    match suffix:
        case "+qk" | "+qk:full" if plan.attention.q is not None:
            raise ConfigError(f"norm plan {text!r}: q and k already have a norm")
        case "+qk" | "+qk:full":
            norm = NormSpec(view="full" if suffix.endswith("full") else "head")
            layers = map(plan.layer, range(n_layers))
            return plan.with_layers([(replace(attention, q=norm, k=norm), other) for attention, other in layers])
        case "+embed" if plan.embed is None:
            return replace(plan, embed=NormSpec())
        case "-final" if plan.final is not None:
            return replace(plan, final=None)
        case "+embed" | "-final":
            raise ConfigError(f"norm plan {text!r}: {suffix} changes nothing here")
    raise ConfigError(f"norm plan {text!r}: unknown suffix {suffix!r}; known: {SUFFIXES}")
