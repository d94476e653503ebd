"""The study of norms in a full model: what each one sees, what it costs to change, and what theory says beforehand.

The model holds no code of this; capture is hooks, and an edit swaps a module in its slot and puts it back.
"""

from importlib import import_module
from typing import Any

_HOME = {  # no module has the name of a function: importing it would hide the function
    "norms": "norm_table",
    "capture": "recording",
    "massive_activation": "recording",
    "score": "cost",
    "edit": "editing",
    "ablate": "ablation",
    "skip_layers": "ablation",
    "move": "moving",
    "fold": "folding",
    "center": "folding",
    "doctor": "diagnosis",
    "predict": "theory",
    "init": "measurement",
    "sweep": "sweeps",
    "race": "training",
    "report": "reporting.report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
