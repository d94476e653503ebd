"""Whether a model is what its config describes. Only then do config and parameters say all that it computes."""

from typing import Any

import torch
from torch import nn

from llama_mini.errors import RequestError
from llama_mini.validate import short_repr


def check_plain(model: nn.Module) -> None:
    """Refuses a model that cannot be saved or rebuilt, with a RequestError that names the module and the difference.

    Such a model has a module of another class, with other settings or shapes, inside `lab.edit`, or with a hook, whose
    effect would silently be lost.
    """
    with torch.device("meta"):
        planned = type(model)(model.config)
    actual, expected = dict(model.named_modules()), dict(planned.named_modules())
    for path in [*expected, *actual]:
        found = _traits(actual.get(path))
        for name, value in _traits(expected.get(path)).items():
            if found.get(name) != value:
                raise RequestError(
                    f"{path or 'the model'} is not what the model's config describes "
                    f"({name}: {_shown(found.get(name))}, not {_shown(value)}): leave the edit, remove the hook, "
                    "or load the checkpoint without optimization, and try again"
                )


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
