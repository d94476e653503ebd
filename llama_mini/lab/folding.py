"""Moves what norms do into the matrices around them: gains into those that read a norm's output, and LayerNorm's
subtraction of the mean into those that write its input."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llama_mini.checkpoint.families import OWN
from llama_mini.checkpoint.hf.config import to_hf
from llama_mini.checkpoint.plain import check_plain
from llama_mini.errors import RequestError
from llama_mini.lab.moving import rebuilt, spec_at, with_specs
from llama_mini.lab.norm_table import effective_gain
from llama_mini.lab.paths import readers, select, slots
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm
from llama_mini.model.norm_slots import BranchPlan

_EMBEDDING, _HEAD = "tok_embeddings.weight", "lm_head.weight"
_WRITERS = ("embed_norm", "out_norm", "post_norm")
_WHY_NOT = {
    **dict.fromkeys(_WRITERS, "it writes the residual stream, which all later layers read"),
    **dict.fromkeys(("q_norm", "k_norm", "v_norm"), "attention reads it, not a matrix"),
    **dict.fromkeys(("gate_norm", "up_norm"), "the activation reads it, or its product with the gate, not a matrix"),
}


@torch.inference_mode(False)  # the new parameters can be trained even if the caller only infers
def fold(model: Llama, pattern: str | Sequence[str] | None = None) -> Llama:
    """A new model whose pre, mid and final norms (or those at `pattern`) have gains of one: their readers absorb them.

    The logits stay the same: within 5e-6 of the largest in float32, and bit for bit if the gains are powers of two. In
    bfloat16 each product of gain and weight is rounded once more. In the default checkpoint the largest error
    against float32 is 0.03 of the largest logit before, and 0.04 to 0.08 after, even if folded in float32.

    A tied head is untied first. A model of a family that has gains keeps them, set to one, so that other programs can
    open it. One that is saved in this project's own format gets `gain: none` in its plan, but a LayerNorm without a
    bias, which would round differently. Scale factors stay in the norms, and so does a LayerNorm's bias, divided by
    the gain. Biases of matrices need no change. The other parameters are shared with `model`, which does not change.

    Raises RequestError, naming the path: for an out, post or embed norm and one of a projection, whose gain cannot be
    folded, for a norm without a gain, for one with a bias and a gain of zero, for one that another norm reads, for a
    model that has nothing to fold, and for one that is edited or optimized.
    """
    check_plain(model)
    paths = _foldable(model) if pattern is None else select(model, pattern)
    parameters, config = dict(model.named_parameters(remove_duplicate=False)), model.config
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
        if (bias := parameters.get(f"{path}.bias")) is not None:
            if not gain.all():
                raise RequestError(f"{path} has a bias and gains of zero, which cannot be folded; leave it out")
            parameters[f"{path}.bias"] = _like(bias, bias.detach() / gain)
        if not (names := readers(path, config)):
            reader = path.replace("attention", "feed_forward")  # of a parallel layer
            raise RequestError(f"the gain of {path} cannot be folded: {reader} reads it; leave it out")
        for name in names:
            parameters[name] = _like(parameters[name], parameters[name].detach() * gain)
        weight = parameters[f"{path}.weight"]
        unit = torch.full_like(weight, 0.0 if norm.gain == "1+w" else 1.0)
        parameters[f"{path}.weight"] = _like(weight, unit)
    specs = {path: spec_at(config, path) for path in paths}
    bare = {p: replace(s, gain="none") for p, s in specs.items() if s is not None and (s.kind != "layer" or s.bias)}
    without_gains = with_specs(config, bare)
    has_no_family = [to_hf(each, "float32")["model_type"] == OWN for each in (config, without_gains)]
    return rebuilt(model, config if has_no_family == [False, True] else without_gains, parameters)


@torch.inference_mode(False)
def center(model: Llama) -> Llama:
    """A new model with RMSNorm instead of LayerNorm and the same logits: within 5e-6 of the largest in float32.

    LayerNorm equals RMSNorm if its input has mean zero. So the mean is subtracted from all that writes the residual
    stream: the rows of the embedding, and the outputs of o_proj and down_proj, biases included. A tied head is untied
    first, since its rows keep their mean. The other parameters are shared with `model`, which does not change.
    Source: Gupta et al. 2024.

    Raises RequestError, naming the path: for a norm that reads the stream and is absent, not LayerNorm or biased, for a
    norm that writes the stream, and for a model that is edited or optimized.
    """
    check_plain(model)
    parameters, plan = dict(model.named_parameters(remove_duplicate=False)), model.config.norm_plan
    for path, norm in slots(model).items():
        if not (plan.parallel and path.endswith("feed_forward.pre_norm")):  # there it does not read the stream
            _check_centrable(path, norm)
    if model.lm_head is None:
        parameters[_HEAD] = parameters[_EMBEDDING]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name == _EMBEDDING:
            parameters[name] = _like(parameter, _without_mean(parameter, dim=1))
        elif ".o_proj." in name or ".down_proj." in name:
            parameters[name] = _like(parameter, _without_mean(parameter, dim=0))
    layers = [(_rms(a), f if plan.parallel else _rms(f)) for a, f in map(plan.layer, range(model.config.n_layers))]
    assert plan.final is not None  # _check_centrable refuses a model without it
    plan = replace(plan.with_layers(layers), final=replace(plan.final, kind="rms"))
    return rebuilt(model, replace(model.config, norm_plan=plan, tie_word_embeddings=False), parameters)


def _foldable(model: Llama) -> list[str]:
    norms = {path: norm for path, norm in slots(model).items() if path.rpartition(".")[2] not in _WHY_NOT}
    with_gain = [path for path, norm in norms.items() if isinstance(norm, Norm) and norm.weight is not None]
    if not with_gain:
        raise RequestError("no norm of the model has a gain that can be folded: those of pre, mid and final norms can")
    return with_gain


def _check_centrable(path: str, norm: nn.Module) -> None:
    slot = path.rpartition(".")[2]
    if slot in _WRITERS and isinstance(norm, Norm):
        raise RequestError(
            f"the model cannot be centred: {path} writes the residual stream, which only matrices may do; move it first"
        )
    if slot in ("pre_norm", "norm") and (not isinstance(norm, Norm) or norm.kind != "layer"):
        actual = f"is of kind {norm.kind}" if isinstance(norm, Norm) else "is empty"
        raise RequestError(
            f"the model cannot be centred: {path} {actual}; pre and final norms must all be of kind layer, which "
            "subtracts the mean"
        )
    if slot in ("pre_norm", "norm") and norm.bias is not None:
        raise RequestError(f"the model cannot be centred: {path} has a bias, which RMSNorm does not have")


def _rms(branch: BranchPlan) -> BranchPlan:
    return replace(branch, pre=branch.pre and replace(branch.pre, kind="rms"))


def _without_mean(parameter: Tensor, dim: int) -> Tensor:
    wide = parameter.detach().double()
    return wide - wide.mean(dim, keepdim=True)


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(parameter.dtype), requires_grad=parameter.requires_grad)
