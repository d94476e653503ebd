"""Edits that stay: a new model whose plan has them, where a plan can."""

from dataclasses import replace

import torch
from torch import nn

from llama_mini.checkpoint.plain import check_plain
from llama_mini.errors import RequestError
from llama_mini.lab.editing import Edits, edited_norms
from llama_mini.lab.freezing import Frozen
from llama_mini.lab.keep import Keep
from llama_mini.lab.moving import Placed, spec_at, with_norms
from llama_mini.lab.texts import Ids
from llama_mini.model.llama import Llama
from llama_mini.model.norm import FrozenNorm, Norm
from llama_mini.model.norm_slots import NormSpec


@torch.inference_mode(False)  # the new parameters can be trained even if the caller only infers
def edited(model: Llama, edits: Edits, ids: Ids | None = None, calibrate: Ids | None = None) -> Llama:
    """A new model with the edits of `edit`, which can be saved: its plan describes them.

    `freeze` makes norms of kind `frozen`, with keep="none" alone. New gains and constants are rounded to the model's
    dtype. The new model shares all other parameters with `model`, which does not change.

    Raises RequestError as `edit` does, naming the path of a frozen norm that keeps tokens apart or has a constant for
    each position, which no plan can express; and for a model that is edited or optimized.
    """
    check_plain(model)
    norms = {path: placed(model, path, module) for path, module in edited_norms(model, edits, ids, calibrate).items()}
    for _, norm in norms.values():
        for name, parameter in norm.named_parameters():
            if parameter.dtype != model.dtype:
                rounded = parameter.detach().to(model.dtype)
                norm.register_parameter(name, nn.Parameter(rounded, requires_grad=parameter.requires_grad))
    return with_norms(model, norms)


def has_plan(module: nn.Module) -> bool:
    """Whether a plan can describe an edited norm."""
    return not isinstance(module, Frozen) or (module.keep == Keep() and not module.inverse_root.ndim)


def placed(model: Llama, path: str, module: nn.Module) -> Placed:
    """An edited norm as a plan describes it. Raises RequestError if none can."""
    if isinstance(module, Frozen):
        if not has_plan(module):
            raise RequestError(
                f"{path} would be frozen with tokens kept apart, or by token, which no plan can express: give "
                "keep='none' and one constant, such as freeze='quadratic'"
            )
        constant = FrozenNorm(module.dim, module.eps, gain=module.gain, cast=module.cast, scale=module.scale)
        constant.weight = module.weight
        constant.inverse_rms = nn.Parameter(module.inverse_root.detach()[None], requires_grad=False)
        module = constant
    if not isinstance(module, Norm):
        return None, module
    old = spec_at(model.config, path) or NormSpec()
    eps = old.eps if module.eps == (model.config.norm_eps if old.eps is None else old.eps) else module.eps
    settings = {name: getattr(module, name) for name in ("kind", "gain", "cast", "scale", "groups", "power")}
    return replace(old, eps=eps, bias=module.bias is not None, **settings), module
