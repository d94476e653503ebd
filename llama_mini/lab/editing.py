"""Changes to the norms of a model that last as long as a `with` block.

An edit puts another module into a norm's slot and puts the very same norm back afterwards. Parameters that the edit
does not change are shared, not copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.lab.cost import as_tokens
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import select, slots
from llama_mini.lab.recording import watched
from llama_mini.model.llama import Llama
from llama_mini.model.norm import NORMS, Cast, Norm, RMSNorm
from llama_mini.validate import is_finite, join_names, short_repr

Edits = Mapping[str, Mapping[str, Any]]
_SETTINGS = ("eps", "kind", "gain", "cast", "freeze", "keep_first", "skip")


@contextmanager
def edit(model: Llama, edits: Edits, ids: Tensor | Sequence[int] | None = None) -> Iterator[Llama]:
    """Changes norms inside a `with` block: {pattern: settings}; each norm belongs to one pattern, or nest two edits.

    eps: a finite number of at least 0.
    kind: a class of norm.py; the gain stays (`scale`, which has a single one, takes the mean of the gains; the α of
        `dyt` starts at 0.5). With a kind, empty slots that the pattern matches get a norm too: unit gain, the model's
        norm_eps, early cast.
    gain: 2.0 sets the effective gain, ("scale", 2.0) multiplies it, "mean" is its mean everywhere, "one" is 1.
    cast: "early" or "late".
    freeze: g·x/c, with c measured on `ids` in the model as it is before this edit. "mean": c² = mean(x²) + eps over the
        whole text (in q and k norms over the heads too), one number a norm; "token": c as it was at each position, so
        that alone, on the same text, it changes no bit. Kinds rms and scale only.
    keep_first: with freeze, token 0 keeps its own statistic and has no part in the mean.
    skip: True leaves the norm out, its scale too.

    `freeze="token"` and `keep_first` need to know positions: inside the block the model reads whole texts from their
    first token, not the continuation of a cache. `ids` is read by `freeze` alone.

    Raises RequestError, naming the pattern, for settings, kinds and values that are unknown, contradict each other or
    would do nothing, and for a text that a frozen norm was not measured on.
    """
    with swapped(model, edited_norms(model, edits, ids)):
        yield model


def edited_norms(model: Llama, edits: Edits, ids: Tensor | Sequence[int] | None = None) -> dict[str, nn.Module]:
    """The modules that an edit puts into its slots, by path; the model is not changed. Arguments and errors: `edit`."""
    if not isinstance(edits, Mapping):
        raise RequestError(f"edits are a mapping of patterns to settings, not {short_repr(edits)}")
    chosen: dict[str, tuple[str, Mapping[str, Any]]] = {}
    known = slots(model)
    for pattern, settings in edits.items():
        _check(pattern, settings)
        for path in select(model, pattern, empty="kind" in settings):
            if path in chosen:
                raise RequestError(
                    f"{short_repr(chosen[path][0])} and {short_repr(pattern)} both match "
                    f"{path}: give each norm one pattern, or nest two edits"
                )
            chosen[path] = pattern, settings
            _check_against(known[path], path, pattern, settings)
    frozen = [path for path, (_, settings) in chosen.items() if "freeze" in settings]
    if frozen and ids is None:
        raise RequestError(
            f"{short_repr(chosen[frozen[0]][0])}: freeze needs ids, the text to measure the statistic on"
        )
    energies = _energies(model, frozen, ids) if frozen else {}
    return {
        path: _edited(model, path, known[path], settings, energies.get(path)).train(known[path].training)
        for path, (_, settings) in chosen.items()
    }


@contextmanager
def swapped(model: Llama, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules at paths of the model, and what was there back when the block ends."""
    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(_put, model, path, model.get_submodule(path))
            _put(model, path, module)
        if any(isinstance(module, Frozen) and module.knows_positions for module in modules.values()):
            stack.callback(model.rope.register_forward_pre_hook(_refuse_continuation).remove)
        yield


class Frozen(RMSNorm):
    """RMSNorm with its reciprocal root given, not computed: one for all rows, or (B, T, ..., 1), by position."""

    kind = "frozen"
    inverse_root: Tensor

    def __init__(self, norm: Norm, inverse_root: Tensor, keep_first: bool) -> None:
        super().__init__(norm.dim, norm.eps, gain=norm.gain, cast=norm.cast, scale=norm.scale, device="meta")
        self.weight = norm.weight
        self.register_buffer("inverse_root", inverse_root, persistent=False)
        self.keep_first = keep_first

    @property
    def knows_positions(self) -> bool:
        return self.keep_first or self.inverse_root.ndim > 0

    def normalise(self, wide: Tensor) -> Tensor:
        normed = wide * self._inverse_root_for(wide)
        if not self.keep_first:
            return normed
        return torch.cat([super().normalise(wide[:, :1]), normed[:, 1:]], dim=1)

    def _inverse_root_for(self, wide: Tensor) -> Tensor:
        known = self.inverse_root
        if known.ndim == 0:
            return known
        if known.shape[0] not in (1, wide.shape[0]) or known.shape[1] < wide.shape[1]:
            raise RequestError(
                f"a norm frozen by token was measured on {known.shape[0]} texts of {known.shape[1]} tokens and reads "
                f"{wide.shape[0]} of {wide.shape[1]}: score the text it was measured on"
            )
        return known[:, : wide.shape[1]]


def _check(pattern: str, settings: Any) -> None:
    """Refuses settings that are wrong whatever the norm."""
    name = short_repr(pattern)
    if not isinstance(settings, Mapping) or not settings:
        raise RequestError(f"{name}: expected settings such as dict(eps=1e-6), found {short_repr(settings)}")
    if unknown := [key for key in settings if key not in _SETTINGS]:
        raise RequestError(
            f"{name}: unknown setting {join_names(map(short_repr, unknown))}; known: {', '.join(_SETTINGS)}"
        )
    names = ", ".join(NORMS)
    eps, kind, gain = settings.get("eps", 0.0), settings.get("kind", "rms"), settings.get("gain", "one")
    if not is_finite(eps) or eps < 0:
        raise RequestError(f"{name}: eps must be a finite number of at least 0, not {short_repr(eps)}")
    if not isinstance(kind, str) or kind not in NORMS:
        raise RequestError(f"{name}: unknown kind {short_repr(kind)}; known: {names}; skip=True leaves a norm out")
    if not _is_gain(gain):
        raise RequestError(f"{name}: gain is a number, ('scale', number), 'mean' or 'one', not {short_repr(gain)}")
    for key, choices in {"cast": get_args(Cast), "freeze": ("mean", "token")}.items():
        if key in settings and not (isinstance(settings[key], str) and settings[key] in choices):
            raise RequestError(f"{name}: {key} must be one of {', '.join(choices)}, not {short_repr(settings[key])}")
    for key in ("keep_first", "skip"):
        if not isinstance(settings.get(key, False), bool):
            raise RequestError(f"{name}: {key} must be true or false, not {short_repr(settings[key])}")
    if "keep_first" in settings and "freeze" not in settings:
        raise RequestError(f"{name}: keep_first belongs to freeze, which is not given")
    for one, others in {"skip": set(_SETTINGS) - {"skip"}, "freeze": {"eps", "kind"}}.items():
        if one in settings and (clash := [key for key in settings if key in others]):
            raise RequestError(f"{name}: {one} leaves nothing for {', '.join(clash)} to change; give one or the other")


def _check_against(module: nn.Module, path: str, pattern: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings that do nothing for the norm they were meant for."""
    old = module.kind if isinstance(module, Norm) else "rms"
    name = f"{short_repr(pattern)}: {path} is of kind {old}"
    if old == "frozen" and "skip" not in settings:
        raise RequestError(f"{name}; give all its settings in one edit")
    if "freeze" in settings and old not in ("rms", "scale"):
        raise RequestError(f"{name}; freeze is for rms and scale, which divide by the root mean square")
    if "eps" in settings and settings.get("kind", old) == "dyt":
        raise RequestError(f"{short_repr(pattern)}: {path} would be of kind dyt, which has no eps")


def _is_gain(gain: Any) -> bool:
    if isinstance(gain, list | tuple):
        return len(gain) == 2 and gain[0] == "scale" and is_finite(gain[1])
    return gain in ("mean", "one") if isinstance(gain, str) else is_finite(gain)


def _energies(model: Llama, paths: Sequence[str], ids: Tensor | Sequence[int] | None) -> dict[str, Tensor]:
    """mean(x²) of every row that the norms see on a text: (B, T, ..., 1), computed as RMSNorm does."""
    found: dict[str, Tensor] = {}

    def see(path: str, x: Tensor, _: Tensor) -> None:
        found[path] = x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1, keepdim=True)

    tokens = as_tokens(model, ids)  # type: ignore[arg-type]  # the caller saw that they are there
    with torch.no_grad(), watched({path: model.get_submodule(path) for path in paths}, see):
        model(tokens)
    return found


def _edited(
    model: Llama, path: str, module: nn.Module, settings: Mapping[str, Any], energy: Tensor | None
) -> nn.Module:
    """The module for one slot."""
    if settings.get("skip"):
        return nn.Identity()
    if "skip" in settings:
        return module
    norm = _changed(module if isinstance(module, Norm) else _unit_norm(model, path), settings)
    if energy is None:
        return norm
    keep_first = settings.get("keep_first", False)
    if settings["freeze"] == "mean":
        energy = (energy[:, 1:] if keep_first else energy).mean()
    return Frozen(norm, torch.rsqrt(energy + norm.eps), keep_first)


def _unit_norm(model: Llama, path: str) -> Norm:
    """A norm of unit gain for an empty slot, of the width that the slot has."""
    config, slot = model.config, path.rpartition(".")[2]
    width = {"q_norm": config.head_dim, "k_norm": config.head_dim, "v_norm": config.head_dim}
    width["mid_norm"] = config.n_heads * config.head_dim if ".attention." in path else config.hidden_dim
    return RMSNorm(width.get(slot, config.dim), config.norm_eps, device=model.device, dtype=model.dtype)


def _changed(old: Norm, settings: Mapping[str, Any]) -> Norm:
    """A norm with other eps, kind, cast and gain; the weight is the old one's own unless the gain changes."""
    cls = NORMS[settings["kind"]] if settings.get("kind", old.kind) != old.kind else type(old)
    weight, gain = old.weight, old.gain
    resized = weight is not None and weight.numel() != (1 if cls.kind == "scale" else old.dim)
    if "gain" in settings or resized:
        weight, gain = nn.Parameter(_new_gain(old, cls, settings.get("gain")), requires_grad=False), "w"
    device = next((p.device for p in old.parameters()), None)
    eps, cast = settings.get("eps", old.eps), settings.get("cast", old.cast)
    new = cls(old.dim, eps, gain=gain, cast=cast, scale=old.scale, device=device).requires_grad_(False)
    new.weight = weight
    if old.kind == new.kind == "dyt":
        new.alpha = old.alpha
    return new


def _new_gain(old: Norm, cls: type[Norm], change: Any) -> Tensor:
    """The effective gain after a change, float32 or wider: stored as `1+w` in bfloat16 it would be rounded anew."""
    gain = effective_gain(old)
    gain = torch.ones(old.dim) if gain is None else gain
    if change == "mean":
        gain = gain.mean(0, keepdim=True).expand_as(gain)
    elif isinstance(change, list | tuple):
        gain = gain * change[1]
    elif change is not None:
        gain = torch.full_like(gain, 1.0 if change == "one" else change)
    return gain.mean(0, keepdim=True) if cls.kind == "scale" else gain.expand(old.dim).clone()


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _refuse_continuation(_: nn.Module, args: tuple[Tensor]) -> None:
    if args[0][..., 0].any():
        raise RequestError("a norm is frozen by position here, and the cache already holds tokens: read the text whole")
