"""Whether a model is what its config describes. Only then do config and parameters say all that it computes."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.validate import short_repr


def check_plain(model: nn.Module) -> None:
    """Refuses a model that cannot be saved or rebuilt, with a RequestError that names the module and the difference.

    Such a model has a module of another class, with other settings or shapes, inside `lab.edit`, or with a hook, whose
    effect would silently be lost.
    """
    with torch.device("meta"):
        planned = type(model)(model.config)
    actual, expected = dict(model.named_modules(remove_duplicate=False)), dict(planned.named_modules())
    for path in [*expected, *actual]:
        found = _traits(actual.get(path))
        for name, value in _traits(expected.get(path)).items():
            if found.get(name) != value:
                what = f"{name}: {_shown(found.get(name))}, not {_shown(value)}"
                do = "leave the edit, remove the hook, or load the checkpoint without optimization, and try again"
                raise RequestError(f"{path or 'the model'} is not what the model's config describes ({what}): {do}")


def check_contents(model: Any, parameters: Mapping[str, Tensor]) -> None:
    """Refuses, with a RequestError, what a checkpoint cannot hold: a rotary table of its own, and missing values."""
    for name in ("rope", "sliding_rope"):
        if (rope := getattr(model, name)) is None:
            continue
        actual, planned = deepcopy(rope).cpu(), type(rope)(model.config, name == "sliding_rope")
        for position in (1, 4 * model.config.max_seq_len):  # a long text may have a table of its own
            both = (each(torch.tensor([[position]])) for each in (actual, planned))
            if not all((a == b).all() for a, b in zip(*both, strict=True)):
                raise RequestError(
                    f"{name} is not what the model's config describes (inv_freq or a config was exchanged), and a "
                    "checkpoint holds the config alone: write the change as rope_theta or rope_scaling, or undo it"
                )
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise RequestError(f"{name} is on the meta device and has no values; load the model, and save it then")
        if parameter.ndim == 1 and not torch.isfinite(parameter).all():  # as in loading: a norm or a bias
            raise RequestError(f"{name} holds NaN or infinity, so that every answer would be NaN; repair it first")


def _traits(module: nn.Module | None) -> dict[str, Any]:
    """All that decides what a module computes, but the values of its parameters."""
    if module is None:
        return {"class": "nothing"}
    own = vars(module)
    settings = {
        name: value
        for name, value in own.items()
        if isinstance(value, int | float | str | tuple | None) and not name.startswith("_") and name != "training"
    }
    return {
        "class": type(module),
        "edited": own.get("edited", False),  # lab.edit marks what it puts into the model
        "hooked": bool(module._forward_hooks or module._forward_pre_hooks or "forward" in own),
        "parameters": {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)},
    } | settings


def _shown(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else short_repr(value)
