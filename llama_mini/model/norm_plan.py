"""Which norm sits in which slot of which layer of a model, as data; norm_slots.py has the slots of a branch.

`NormPlan.parse("out+qk:full", n_layers)` makes a plan from a preset; `to_dict` and `from_dict` are its JSON form.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llama_mini.errors import ConfigError
from llama_mini.model.norm_slots import HEAD_SLOTS, BranchPlan, NormSpec, check_slot, known_keys
from llama_mini.validate import is_whole, short_repr

BRANCHES = ("attention", "feed_forward")
PRESETS = "pre, post, peri, out, none, deep, mix(SHARE), lns, sub, normformer"
SUFFIXES = "+qk, +qk:full, +embed, -final"


@dataclass(frozen=True, kw_only=True)
class Override:
    """Branches that replace the plan's own in the layers `first` to `last`, both included."""

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
    """Where the norms of a whole model are: data, validated, the same for real weights, an init study or a training."""

    attention: BranchPlan = field(default_factory=BranchPlan)
    feed_forward: BranchPlan = field(default_factory=BranchPlan)
    embed: NormSpec | None = None
    final: NormSpec | None = field(default_factory=NormSpec)
    overrides: tuple[Override, ...] = ()  # of two that name the same layer, the later one holds

    def __post_init__(self) -> None:
        for name in BRANCHES:
            _check_branch(name, getattr(self, name))
        for name in ("embed", "final"):
            check_slot(name, getattr(self, name), head=False)
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
        """The plan whose layer `i` is `layers[i]`, attention and feed-forward; embed and final stay.

        The same layers always make an equal plan: the commonest branch is the plan's own (of equally common ones the
        last), and neighbours that differ from it alike share an override.
        """
        own: dict[str, Any] = {
            name: _commonest(branches) for name, branches in zip(BRANCHES, zip(*layers, strict=True), strict=True)
        }
        overrides: list[Override] = []
        for i, branches in enumerate(layers):
            differs = {name: b for name, b in zip(BRANCHES, branches, strict=True) if b != own[name]}
            here = Override(first=i, last=i, **differs)
            if overrides and overrides[-1] == replace(here, first=overrides[-1].first, last=i - 1):
                overrides[-1] = replace(here, first=overrides[-1].first)
            elif differs:
                overrides.append(here)
        return replace(self, **own, overrides=tuple(overrides))

    def check_depth(self, n_layers: int) -> None:
        """Refuses an override of a layer that a model of `n_layers` does not have."""
        for override in self.overrides:
            if override.last >= n_layers:
                raise ConfigError(
                    f"norm plan: override of layers {override.first}-{override.last} in a model of {n_layers} layers"
                )

    @staticmethod
    def parse(text: str, n_layers: int) -> "NormPlan":
        """A preset with its suffixes, such as `out+qk:full`, for a model of `n_layers`.

        Raises ConfigError, naming what is known, for anything but PRESETS and SUFFIXES.
        """
        head, *suffixes = re.split(r"(?=[+-])", text.strip())
        plan = _preset(head, n_layers)
        for suffix in suffixes:
            plan = _suffix(plan, suffix, text)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: empty slots and default values are left out."""
        return {
            "attention": self.attention.to_dict(),
            "feed_forward": self.feed_forward.to_dict(),
            "embed": self.embed and self.embed.to_dict(),
            "final": self.final and self.final.to_dict(),
        } | ({"overrides": [override.to_dict() for override in self.overrides]} if self.overrides else {})

    @staticmethod
    def from_dict(data: Any) -> "NormPlan":
        """The inverse of `to_dict`. Raises ConfigError for an unknown or misplaced key."""
        data = known_keys(data, NormPlan, "the whole")
        entries = data.get("overrides", [])
        if not isinstance(entries, list):
            raise ConfigError(f"norm plan: overrides must be a list, not {short_repr(entries)}")
        parts: dict[str, Any] = {name: BranchPlan.from_dict(data[name], name) for name in BRANCHES if name in data}
        parts |= {name: NormSpec.from_dict(data[name], name) for name in ("embed", "final") if name in data}
        return NormPlan(**parts, overrides=tuple(Override.from_dict(entry) for entry in entries))


def _commonest(branches: Sequence[BranchPlan]) -> BranchPlan:
    return Counter(reversed(branches)).most_common(1)[0][0]  # of equals, the one counted first


def _check_branch(name: str, branch: Any) -> None:
    if not isinstance(branch, BranchPlan):
        raise ConfigError(f"norm plan: {name} takes a BranchPlan, not {short_repr(branch)}")
    for slot in HEAD_SLOTS:
        if name == "feed_forward" and getattr(branch, slot) is not None:
            raise ConfigError(f"norm plan: slot {slot} exists in attention only, not in feed_forward")


def _preset(name: str, n_layers: int) -> NormPlan:
    rms = NormSpec()
    pre, post, out = BranchPlan(pre=rms), BranchPlan(post=rms), BranchPlan(out=rms)
    both, sub = BranchPlan(pre=rms, out=rms), BranchPlan(pre=rms, mid=rms)

    def everywhere(branch: BranchPlan, **rest: Any) -> NormPlan:
        return NormPlan(attention=branch, feed_forward=branch, **rest)

    if mix := re.fullmatch(r"mix\(\s*(\d*\.?\d+|\d+\.)\s*\)", name):  # Mix-LN: the first layers post, the rest pre
        share = float(mix[1])
        if share > 1:
            raise ConfigError(f"norm plan {name!r}: the share of layers must lie between 0 and 1")
        n_post = math.floor(share * n_layers + 1e-9)
        return NormPlan().with_layers([(post, post)] * n_post + [(pre, pre)] * (n_layers - n_post))
    match name:
        case "pre":  # LLaMA
            return everywhere(pre)
        case "post":  # the original Transformer
            return everywhere(post, final=None)
        case "peri":  # Gemma 2
            return everywhere(both)
        case "out":  # OLMo 2
            return everywhere(out)
        case "none":
            return everywhere(BranchPlan())
        case "deep":  # DeepNorm
            return everywhere(replace(post, alpha=(2 * n_layers) ** 0.25), final=None)
        case "lns":  # LayerNorm Scaling: layer l, from 1, divides its norm's output by √l
            scaled = [BranchPlan(pre=NormSpec(scale=(i + 1) ** -0.5)) for i in range(n_layers)]
            return NormPlan().with_layers([(branch, branch) for branch in scaled])
        case "sub":  # Sub-LN
            return everywhere(sub)
        case "normformer":
            return NormPlan(attention=both, feed_forward=sub)
    raise ConfigError(f"norm plan: unknown preset {short_repr(name)}; known: {PRESETS}; suffixes: {SUFFIXES}")


def _suffix(plan: NormPlan, suffix: str, text: str) -> NormPlan:
    match suffix:
        case "+qk" | "+qk:full" if plan.attention.q is not None:
            raise ConfigError(f"norm plan {text!r}: q and k already have a norm")
        case "+qk" | "+qk:full":
            norm = NormSpec(view="full" if suffix.endswith("full") else "head")
            overrides = [
                o if o.attention is None else replace(o, attention=replace(o.attention, q=norm, k=norm))
                for o in plan.overrides
            ]
            attention = replace(plan.attention, q=norm, k=norm)
            return replace(plan, attention=attention, overrides=tuple(overrides))
        case "+embed" if plan.embed is None:
            return replace(plan, embed=NormSpec())
        case "-final" if plan.final is not None:
            return replace(plan, final=None)
        case "+embed" | "-final":
            raise ConfigError(f"norm plan {text!r}: {suffix} changes nothing here")
    raise ConfigError(f"norm plan {text!r}: unknown suffix {suffix!r}; known: {SUFFIXES}")
