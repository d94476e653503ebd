"""Where NaN or infinity begins in a forward pass."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from llama_mini.engine.logprobs import hidden_states
from llama_mini.model.llama import Llama


def first_nonfinite(model: Llama, outputs: Iterable[Tensor]) -> str | None:
    """Where NaN or infinity begins: the innermost module that returns it, and the first token; None if none does.

    outputs: runs the model when it is iterated, on the next tokens each time: (..., T, C).
    """
    found: list[str] = []
    n_before = 0

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(_module: nn.Module, _args: Any, y: Any) -> None:
            if not found and isinstance(y, Tensor) and len(bad := (~y.isfinite()).flatten(2).any(-1).nonzero()):
                row, token = bad[0].tolist()
                of_row = f" of row {row}" if len(y) > 1 else ""
                found.append(f"{path or 'the logits'}, token {n_before + token}{of_row}")

        return see

    # An empty slot is left out: the module before it in the forward pass says more.
    modules = [(path, module) for path, module in model.named_modules() if not isinstance(module, nn.Identity)]
    hooks = [module.register_forward_hook(watch(path)) for path, module in modules]
    try:
        for y in outputs:
            if found:
                return found[0]
            n_before += y.shape[-2]
    finally:
        for hook in hooks:
            hook.remove()
    return None


def non_finite_message(model: Llama, ids: list[int]) -> str:
    """What is wrong with the logits after these tokens."""
    first = first_nonfinite(model, hidden_states(model, ids, model.new_cache(1, len(ids))))
    where = "the output of every layer is finite" if first is None else f"it is first at {first}"
    return f"the logits after position {len(ids) - 1} hold NaN or infinity; {where}"
