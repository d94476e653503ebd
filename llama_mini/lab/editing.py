"""Changes to the norms of a model that last as long as a `with` block.

An edit puts another module into a norm's slot, and the original module back when the block ends. Parameters that the
edit does not change are shared, not copied.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.lab.freezing import FREEZABLE, FREEZE, Frozen, frozen_norms
from llama_mini.lab.keep import as_keep
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import select, slot_width, slots
from llama_mini.lab.texts import Ids
from llama_mini.model.llama import Llama
from llama_mini.model.norm import NORMS, Cast, Norm, RMSNorm
from llama_mini.validate import (
    as_plain,
    check_choice,
    check_flag,
    check_number,
    check_whole,
    is_finite,
    is_whole,
    join_names,
    short_repr,
)

Edits = Mapping[str, Mapping[str, Any]]
SETTINGS = ("eps", "kind", "gain", "alpha", "groups", "power", "cast", "freeze", "keep", "skip")


@contextmanager
def edit(model: Llama, edits: Edits, ids: Ids | None = None, calibrate: Ids | None = None) -> Iterator[Llama]:
    """Changes norms inside a `with` block: {pattern: settings}. Two patterns may not match the same norm: nest edits.

    eps: a finite number of at least 0.
    kind: a kind of norm.py. The gain stays, but `scale` has a single one and takes the mean; the α of `dyt` and `derf`
        is 0.5 unless given. With a kind, empty slots that the pattern matches are filled too, with a norm of unit gain,
        the model's norm_eps and early cast.
    gain: 2.0 sets the effective gain, ("scale", 2.0) multiplies it, "mean" replaces it by its mean, "one" by 1; a list
        of a number for each element sets them all. {"dims": [3, 507]} sets these elements to 0, or with
        {"dims": [3, 507], "gain": ("scale", 0.5)} to what that gain says.
    alpha, groups, power: of `dyt` and `derf`, of `group`, and of `power`.
    cast: "early" or "late".
    freeze: compute g·x/c with a constant c, measured on `ids` in the model before this edit. Kinds rms and scale only.
        c is one number per norm, in q and k norms over the heads too: of the r = √(mean x² + eps) of the vectors it is
        "quadratic", the root of their mean square; "arithmetic", their mean (Heimersheim 2024; Baroni et al. 2025);
        or "median". "token": one c per position, so that this setting alone changes no bit on the same text.
    keep: with freeze, which tokens keep their own statistic and are left out of c; see keep.py. "first" is the default.
    skip: True removes the norm, and its scale with it.
    ids: the texts for `freeze`; no other setting needs them.
    calibrate: other texts to measure c on; `ids` are then those that will be read.

    An edited model is neither saved, moved, folded nor centred.

    Raises RequestError, naming the pattern: for settings, kinds and values that are unknown, contradict each other or
    would do nothing, and for a text that a frozen norm was not measured on.
    """
    with swapped(model, edited_norms(model, edits, ids, calibrate)):
        yield model


def edited_norms(
    model: Llama, edits: Edits, ids: Ids | None = None, calibrate: Ids | None = None
) -> dict[str, nn.Module]:
    """The modules that an edit puts into the slots, by path. The model is not changed. Arguments and errors: `edit`."""
    if not isinstance(edits, Mapping):
        raise RequestError(f"edits must be a mapping of patterns to settings, not {short_repr(edits)}")
    chosen: dict[str, tuple[str, Mapping[str, Any]]] = {}
    known = slots(model)
    for pattern, settings in edits.items():
        try:
            _check(settings)
        except RequestError as error:
            raise RequestError(f"{short_repr(pattern)}: {error}") from None
        for path in select(model, pattern, empty="kind" in settings):
            if path in chosen:
                raise RequestError(
                    f"{short_repr(chosen[path][0])} and {short_repr(pattern)} both match "
                    f"{path}: give each norm one pattern, or nest two edits"
                )
            chosen[path] = pattern, settings
            _check_against(model, known[path], path, pattern, settings)
    frozen = [path for path, (_, settings) in chosen.items() if "freeze" in settings]
    if frozen and ids is None:
        raise RequestError(
            f"{short_repr(chosen[frozen[0]][0])}: freeze needs ids, the text to measure the statistic on"
        )
    if calibrate is not None and not any(chosen[path][1]["freeze"] != "token" for path in frozen):
        raise RequestError("calibrate gives the texts for one constant per norm: freeze norms, but not by token")
    modules = {path: _edited(model, path, known[path], settings) for path, (_, settings) in chosen.items()}
    if ids is not None and frozen:
        modules |= frozen_norms(model, {path: (modules[path], chosen[path][1]) for path in frozen}, ids, calibrate)
    return {path: module.train(known[path].training) for path, module in modules.items()}


@contextmanager
def swapped(model: Llama, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules at paths of the model, and puts the original ones back when the block ends."""
    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(_put, model, path, model.get_submodule(path))
            if module is not model.get_submodule(path):
                module.edited = True  # type: ignore[assignment]  # so that the model is not saved as if it were plain
            _put(model, path, module)
        frozen = [module for module in modules.values() if isinstance(module, Frozen)]
        for reading in {norm.reading for norm in frozen}:
            stack.enter_context(reading.follows(model, tokens=any(norm.knows_tokens for norm in frozen)))
        yield


def _check(settings: Any) -> None:
    """Refuses settings that are wrong for every norm."""
    if not isinstance(settings, Mapping) or not settings:
        raise RequestError(f"expected settings such as dict(eps=1e-6), found {short_repr(settings)}")
    if unknown := [key for key in settings if key not in SETTINGS]:
        raise RequestError(f"unknown setting {join_names(map(short_repr, unknown))}; known: {', '.join(SETTINGS)}")
    kind = settings.get("kind", "rms")
    check_number("eps", settings.get("eps", 0.0), RequestError, 0)
    if not isinstance(kind, str) or kind not in NORMS:
        raise RequestError(f"unknown kind {short_repr(kind)}; known: {', '.join(NORMS)}; skip=True leaves a norm out")
    if not _is_gain(gain := settings.get("gain", "one")):
        known = "a number, ('scale', number), 'mean', 'one', a list of numbers or {'dims': [...]}"
        raise RequestError(f"gain must be {known}, not {short_repr(gain)}")
    for name in ("alpha", "power"):
        check_number(name, settings.get(name, 1.0), RequestError)
    check_whole("groups", settings.get("groups", 1), RequestError)
    check_choice("cast", settings.get("cast", "early"), get_args(Cast), RequestError)
    check_choice("freeze", settings.get("freeze", "token"), FREEZE, RequestError)
    as_keep(settings.get("keep", "none"))
    check_flag("skip", settings.get("skip", False), RequestError)
    if "keep" in settings and "freeze" not in settings:
        raise RequestError("keep needs freeze: give both, or leave it out")
    for one, others in {"skip": set(SETTINGS) - {"skip"}, "freeze": {"eps", "kind"}}.items():
        if one in settings and (clash := [key for key in settings if key in others]):
            raise RequestError(f"with {one}, {', '.join(clash)} would change nothing; give one or the other")


def _check_against(model: Llama, module: nn.Module, path: str, pattern: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings that would do nothing to this norm, or that do not fit it."""
    old = module.kind if isinstance(module, Norm) else "rms"
    width = module.dim if isinstance(module, Norm) else slot_width(model.config, path)
    name = f"{short_repr(pattern)}: {path} is of kind {old}"
    if isinstance(module, Frozen) and "skip" not in settings:
        raise RequestError(f"{name}; give all its settings in one edit")
    if "freeze" in settings and old not in FREEZABLE:
        raise RequestError(f"{name}; freeze is for {' and '.join(FREEZABLE)}, which divide by the root mean square")
    new = NORMS.get(settings.get("kind", old), RMSNorm)
    would_be = f"{short_repr(pattern)}: {path} would be of kind {new.kind}, which has"
    has = {"eps": new.has_eps, "alpha": "alpha" in new.numbers}
    has |= {name: name in new.takes for name in ("groups", "power")}
    if unused := [name for name in has if name in settings and not has[name]]:
        raise RequestError(f"{would_be} no {join_names(unused)}")
    if width % settings.get("groups", 1):
        raise RequestError(f"{would_be} {width} elements, not a multiple of {settings['groups']} groups")
    gain, n_gains = as_plain(settings.get("gain")), new.n_gains or width
    if isinstance(gain, list | tuple) and gain[0] != "scale" and len(gain) != n_gains:
        raise RequestError(f"{would_be} {n_gains} gains, not {len(gain)}: give as many numbers")
    if isinstance(gain, Mapping) and max(gain["dims"]) >= n_gains:
        raise RequestError(f"{would_be} {n_gains} gains, and no dimension {max(gain['dims'])}; the first one is 0")
    if isinstance(module, Norm) and module.bias is not None:
        if "bias" not in new.takes:
            raise RequestError(f"{name} with a bias, which kind {new.kind} does not have")
        if settings.get("cast") == "early":
            raise RequestError(f"{name} with a bias, which rounds last: leave cast out")


def _is_gain(gain: Any, in_dims: bool = False) -> bool:
    match as_plain(gain):
        case "mean" | "one":
            return True
        case ["scale", factor]:
            return is_finite(factor)
        case {"dims": [*dims], **rest} if dims and rest.keys() <= {"gain"} and not in_dims:
            return all(is_whole(dim) and dim >= 0 for dim in dims) and _is_gain(rest.get("gain", 0), in_dims=True)
        case [*values] if values and not in_dims:
            return all(map(is_finite, values))
        case value:
            return is_finite(value)


def _edited(model: Llama, path: str, module: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The module for one slot, but for `freeze`."""
    if settings.get("skip"):
        return nn.Identity()
    if "skip" in settings:
        return module
    if not isinstance(module, Norm):  # an empty slot gets a norm of unit gain
        width = slot_width(model.config, path)
        module = RMSNorm(width, model.config.norm_eps, device=model.device, dtype=model.dtype)
    return _changed(module, settings, model.device)


def _changed(old: Norm, settings: Mapping[str, Any], device: torch.device) -> Norm:
    """A norm with other eps, kind, cast and gain. It shares the old one's weight unless the gain changes."""
    cls = NORMS[settings["kind"]] if settings.get("kind", old.kind) != old.kind else type(old)
    weight, gain = old.weight, old.gain
    resized = weight is not None and weight.numel() != (1 if cls.kind == "scale" else old.dim)
    if "gain" in settings or resized:
        weight, gain = nn.Parameter(_new_gain(old, cls, settings.get("gain")).to(device), requires_grad=False), "w"
    eps, cast = settings.get("eps", old.eps), settings.get("cast", old.cast)
    own = {name: settings.get(name, getattr(old, name)) for name in ("groups", "power") if name in cls.takes}
    own |= {"gain": gain, "cast": cast, "scale": old.scale, "bias": old.bias is not None}
    new = cls(old.dim, eps, **own, device=device).requires_grad_(False)
    new.weight, new.bias = weight, old.bias
    for name, start in new.numbers.items():
        if name in old.numbers and name not in settings:
            setattr(new, name, old.get_parameter(name))
        else:
            nn.init.constant_(new.get_parameter(name), settings.get(name, start))
    return new


def _new_gain(old: Norm, cls: type[Norm], change: Any) -> Tensor:
    """The effective gain after a change, in float32 or wider: as a bfloat16 `1+w` it would be rounded again."""
    gain = effective_gain(old)
    gain = torch.ones(old.dim, device="cpu", dtype=torch.float32) if gain is None else gain
    gain = gain.mean(0, keepdim=True) if cls.n_gains == 1 else gain.expand(old.dim)
    return _changed_gain(gain, as_plain(change)).clone()


def _changed_gain(gain: Tensor, change: Any) -> Tensor:
    match change:
        case None:
            return gain
        case "mean":
            return gain.mean(0, keepdim=True).expand_as(gain)
        case "one":
            return torch.ones_like(gain)
        case ["scale", factor]:
            return gain * factor
        case [*values]:
            return torch.tensor(values, dtype=gain.dtype, device=gain.device)
        case {"dims": dims, **rest}:
            new = gain.clone()
            new[dims] = _changed_gain(gain, rest.get("gain", 0.0))[dims]
            return new
        case number:
            return torch.full_like(gain, number)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
