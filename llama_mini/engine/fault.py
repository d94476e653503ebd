"""Where the numbers of a model first went wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llama_mini.memory import PREFILL_CHUNK
from llama_mini.model.llama import Llama


def blame(model: Llama, ids: list[int]) -> str:
    """A sentence about logits that are not finite: the same tokens once more, watching every layer."""
    bad: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, y: None if torch.isfinite(y).all() else bad.append(name)

    stages = {"tok_embeddings": model.tok_embeddings} | {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in stages.items()]
    try:
        cache = model.new_cache(1, len(ids))
        with torch.inference_mode():
            for chunk in torch.tensor([ids], device=model.device).split(PREFILL_CHUNK, dim=1):
                model.hidden(chunk, cache)
    finally:
        for hook in hooks:
            hook.remove()
    where = f"the output of {bad[0]} is the first that does" if bad else "the output of every layer is finite"
    return f"the logits after position {len(ids) - 1} hold NaN or infinity; {where}"
