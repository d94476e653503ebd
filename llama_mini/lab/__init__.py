"""The study of norms in a full model: what each one sees, what a change to it costs, and what theory predicts.

The model contains no code of the lab: capture uses hooks, and an edit replaces a module and puts the original back.
"""

from importlib import import_module
from typing import Any

_HOME = {  # no module has a function's name: importing the module would hide the function
    "norms": "norm_table",
    "folded_gains": "norm_table",
    "capture": "recording",
    "attention": "attention_heads",
    "compare": "comparison",
    "gradients": "gradient_flow",
    "score": "cost",
    "edit": "editing",
    "edited": "applying",
    "ablate": "ablation",
    "skip_layers": "ablation",
    "audit": "auditing",
    "move": "moving",
    "move_fitted": "fitting",
    "insert": "inserting",
    "fold": "folding",
    "center": "folding",
    "doctor": "diagnosis",
    "predict": "theory",
    "init": "measurement",
    "sweep": "sweeps",
    "race": "training",
    "heal": "healing",
    "report": "reporting.report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
