"""Norms rewritten into the weights around them: gains into what reads them, LayerNorm's mean into what writes it."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from llama_mini.errors import RequestError
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import select, slots
from llama_mini.lab.trees import check_plain, rebuilt
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_slots import BranchPlan

_EMBEDDING, _HEAD = "tok_embeddings.weight", "lm_head.weight"
_READERS = {  # the only matrices that read a norm's output
    "attention.pre_norm": ("q_proj", "k_proj", "v_proj"),
    "attention.mid_norm": ("o_proj",),
    "feed_forward.pre_norm": ("gate_proj", "up_proj"),
    "feed_forward.mid_norm": ("down_proj",),
}
_STREAM = "it writes the residual stream, which everything behind it reads"
_WHY_NOT = {
    "embed_norm": _STREAM,
    "out_norm": _STREAM,
    "post_norm": _STREAM,
    "q_norm": "attention reads it, not a matrix",
    "k_norm": "attention reads it, not a matrix",
    "v_norm": "attention reads it, not a matrix",
}


def fold(model: Llama, pattern: str | None = None) -> Llama:
    """A new model whose pre, mid and final norms (those at `pattern`) have gains of one, which the weights now hold.

    The logits stay: within 5e-6 of the largest in float32, bit for bit where the gains are powers of two. In bfloat16
    the products are rounded once more: in the default checkpoint the largest error of a logit against float32, 0.03 of
    the largest logit, becomes 0.04 to 0.08, also when folded in float32 and rounded then. A tied
    head is untied first. The norms keep their weights, at one, so that the model stays of its family and any program
    opens it; scale factors stay in the norms, biases need no change. The other parameters are shared with `model`,
    which stays as it is.

    Raises RequestError that names the path: the gain of an out, post, embed, q, k or v norm cannot be folded, a norm
    has no gain, nothing is there to fold, or the model is edited or optimised.
    """
    check_plain(model)
    paths = _foldable(model) if pattern is None else select(model, pattern)
    parameters, config = dict(model.named_parameters()), model.config
    for path in paths:
        norm = model.get_submodule(path)
        slot = path.rpartition(".")[2]
        if slot in _WHY_NOT:
            raise RequestError(f"the gain of {path} cannot be folded: {_WHY_NOT[slot]}; leave it out")
        gain = effective_gain(norm) if isinstance(norm, Norm) else None
        if gain is None:
            raise RequestError(f"{path} has no gain to fold; leave it out")
        if path == "norm" and model.lm_head is None:
            config = replace(config, tie_word_embeddings=False)
            parameters[_HEAD] = parameters[_EMBEDDING]
        for name in _readers(path):
            parameters[name] = _like(parameters[name], parameters[name].detach() * gain)
        weight = parameters[f"{path}.weight"]
        unit = torch.full_like(weight, 0.0 if norm.gain == "1+w" else 1.0)
        parameters[f"{path}.weight"] = _like(weight, unit)
    return rebuilt(model, config, parameters)


def center(model: Llama) -> Llama:
    """A new model with RMSNorm in the place of LayerNorm, and the same logits: within 5e-6 of the largest in float32.

    LayerNorm is RMSNorm of an input without a mean. The mean of the residual stream is taken out of what writes it,
    the embedding's rows and the outputs of o_proj and down_proj, biases included; a tied head is untied first, since
    it keeps its rows. The other parameters are shared with `model`, which stays as it is.
    Source: Gupta et al. 2024.

    Raises RequestError that names the path: a norm that reads the stream is no LayerNorm or is absent, a norm writes
    the stream, or the model is edited or optimised.
    """
    check_plain(model)
    for path, norm in slots(model).items():
        _check_centrable(path, norm)
    parameters, plan = dict(model.named_parameters()), model.config.norm_plan
    if model.lm_head is None:
        parameters[_HEAD] = parameters[_EMBEDDING]
    for name, parameter in model.named_parameters():
        if name == _EMBEDDING:
            parameters[name] = _like(parameter, _without_mean(parameter, dim=1))
        elif ".o_proj." in name or ".down_proj." in name:
            parameters[name] = _like(parameter, _without_mean(parameter, dim=0))
    layers = [(_rms(a), _rms(f)) for a, f in map(plan.layer, range(model.config.n_layers))]
    assert plan.final is not None  # _check_centrable has seen it
    plan = replace(plan.with_layers(layers), final=replace(plan.final, kind="rms"))
    return rebuilt(model, replace(model.config, norm_plan=plan, tie_word_embeddings=False), parameters)


def _foldable(model: Llama) -> list[str]:
    norms = {path: norm for path, norm in slots(model).items() if path.rpartition(".")[2] not in _WHY_NOT}
    found = [path for path, norm in norms.items() if isinstance(norm, Norm) and norm.weight is not None]
    if not found:
        raise RequestError("no norm of the model has a gain that can be folded: those of pre, mid and final norms can")
    return found


def _readers(path: str) -> list[str]:
    if path == "norm":
        return [_HEAD]
    layer, _, slot = path.rpartition(".")
    return [f"{layer}.{reader}.weight" for reader in _READERS[f"{layer.rpartition('.')[2]}.{slot}"]]


def _check_centrable(path: str, norm: nn.Module) -> None:
    slot = path.rpartition(".")[2]
    if slot in ("embed_norm", "out_norm", "post_norm") and isinstance(norm, Norm):
        raise RequestError(
            f"the model cannot be centred: {path} writes the residual stream, which only matrices may; move it first"
        )
    if slot in ("pre_norm", "norm") and (not isinstance(norm, Norm) or norm.kind != "layer"):
        found = f"is of kind {norm.kind}" if isinstance(norm, Norm) else "is empty"
        raise RequestError(
            f"the model cannot be centred: {path} {found}; pre and final norms must all be of kind layer, which takes "
            "off the stream's mean"
        )


def _rms(branch: BranchPlan) -> BranchPlan:
    return replace(branch, pre=branch.pre and replace(branch.pre, kind="rms"))


def _without_mean(parameter: Tensor, dim: int) -> Tensor:
    wide = parameter.detach().double()
    return wide - wide.mean(dim, keepdim=True)


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(parameter.dtype), requires_grad=parameter.requires_grad)
