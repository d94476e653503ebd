"""The engine: from prompts to completions. Names are imported at first use, so that importing the package is cheap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_mini.engine.llm import LLM
    from llama_mini.engine.request import Chunk, Completion

__all__ = ["LLM", "Chunk", "Completion"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'llm' if name == 'LLM' else 'request'}"), name)
