"""The gradient of the loss at each point of the residual stream of a real model, and through each of its norms."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_mini.engine.finite import first_nonfinite
from llama_mini.engine.logprobs import LOGITS_AT_ONCE
from llama_mini.errors import NumericalError
from llama_mini.lab.paths import slots
from llama_mini.lab.recording import first_and_median, watched
from llama_mini.lab.table import Table
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm

_PARTS = ("output", "input", "gain")  # of a norm
_STREAM = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class Gradient:
    """The size of the gradient of the mean loss, in nats, at one point.

    point: `layers.N.resid_pre`, `resid_mid` or `resid_post`: the residual stream before, inside and after a layer; or a
        norm's path with `.output`, `.input` or `.gain`.
    rms: the root mean square over all elements. first: over those of the first token, the median over the texts.
        median: that of the median token among the others. At a gain, which has no tokens, `first` and `median` are
        those of the parts that the tokens add to it.
    """

    point: str
    rms: float
    first: float
    median: float


class Gradients(Table[Gradient]):
    """The rows, and at each point the root mean square of each token's gradient: `.by_token[point]`, (B, T)."""

    def __init__(self, rows: list[Gradient], by_token: Mapping[str, Tensor]) -> None:
        super().__init__(rows)
        self.by_token = by_token


def gradients(model: Llama, ids: Ids) -> Gradients:
    """The gradient of the mean loss along the residual stream and at each norm, by token; no weight is changed.

    `.output` of a norm is the gradient that reaches its output. `.input` is what the norm lets through to its input:
    that gradient times the norm's Jacobian, for RMSNorm diag(g)/r · (I - x̂x̂ᵀ/d) with x̂ = x/r. The input of a
    pre-norm is also the residual stream, whose gradient has a second part, which bypasses the branch.

    The layers are run again one by one, from the last on, so that memory is needed for the graph of one layer, the
    stream between layers and a few logits. A quantised or optimized model is differentiated by PyTorch's operators.

    Raises RequestError for ids that the model cannot read; NumericalError if the loss is not finite.
    """
    texts = as_texts(model, ids)
    with torch.inference_mode(False), torch.no_grad():
        found = _Found(model, texts)
        embedded, calls, last, normed = _forward(model, texts.tokens)
        gradient = found.back(model.norm, [last], _of_the_logits(model, normed, texts), {"norm": model.norm})
        for i in reversed(range(len(model.layers))):
            found.add(f"layers.{i}.resid_post", gradient)
            modules = {f"layers.{i}.{name}": module for name, module in model.layers[i].named_modules()}
            inside = {path: module for path, module in modules.items() if isinstance(module, Norm)}
            middle = {f"layers.{i}.resid_mid": modules[f"layers.{i}.attention"]}
            gradient = found.back(model.layers[i], calls.pop(), gradient, inside | middle)
            found.add(f"layers.{i}.resid_pre", gradient)
        found.back(model.embed_norm, [embedded], gradient, {"embed_norm": model.embed_norm})
    return found.table()


def _forward(model: Llama, tokens: Tensor) -> tuple[Tensor, list[Sequence[Any]], Tensor, Tensor]:
    """The embedding, what each layer is called with, and the final norm's input and output."""
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    calls: list[Sequence[Any]] = []
    with ExitStack() as stack:
        for layer in model.layers:
            stack.callback(layer.register_forward_pre_hook(lambda _, args: calls.append(args)).remove)
        both = {"embed_norm": model.embed_norm, "norm": model.norm}
        stack.enter_context(watched(both, lambda name, x, y: ends.update({name: (x, y)})))
        model.hidden(tokens)
    return ends["embed_norm"][0], calls, *ends["norm"]


def _of_the_logits(model: Llama, x: Tensor, texts: Texts) -> Tensor:
    """The gradient of the mean loss at the head's input (B, T, C), a few logits at a time."""
    predicted, loss, parts = texts.real[:, 1:], 0.0, list[Tensor]()
    pairs = (z[predicted].split(LOGITS_AT_ONCE) for z in (x[:, :-1], texts.tokens[:, 1:]))
    for rows, ids in zip(*pairs, strict=True):
        with torch.enable_grad():
            part = F.cross_entropy(model.logits(rows.requires_grad_()), ids, reduction="sum") / predicted.sum()
            parts += torch.autograd.grad(part, rows)
        loss += float(part)
    if not math.isfinite(loss):
        first = first_nonfinite(model, map(model.hidden, [texts.tokens])) or "the head"
        raise NumericalError(f"the loss is {loss}, so there is no gradient; NaN or infinity first at {first}")
    gradient = torch.zeros_like(x)
    gradient[:, :-1][predicted] = torch.cat(parts)
    return gradient


class _Found:
    """The gradients found so far, by point: the root mean square by token, and over all elements."""

    def __init__(self, model: Llama, texts: Texts) -> None:
        self.model, self.real = model, texts.real
        self.by_token: dict[str, Tensor] = {}
        self.rms: dict[str, float] = {}

    def back(self, module: nn.Module, args: Sequence[Any], gradient: Tensor, inside: Mapping[str, nn.Module]) -> Tensor:
        """From the gradient at a module's output to that at its input, and on the way at the outputs inside."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.enable_grad(), watched(inside, lambda name, x, y: seen.update({name: (x, y)})):
            x = args[0].detach().requires_grad_()
            y = module(x, *args[1:])
            at_x, *at_outputs = torch.autograd.grad(y, [x, *(output for _, output in seen.values())], gradient)
        for (name, (read, _)), at_output in zip(seen.items(), at_outputs, strict=True):
            if isinstance(norm := inside[name], Norm):
                self._add_norm(name, norm, read.detach(), at_output)
            elif name.endswith("resid_mid"):
                self.add(name, at_output)
        return at_x

    def _add_norm(self, path: str, norm: Norm, x: Tensor, at_output: Tensor) -> None:
        with torch.enable_grad():
            (at_input,) = torch.autograd.grad(norm(x.requires_grad_()), x, at_output)
        self.add(f"{path}.output", at_output)
        self.add(f"{path}.input", at_input)
        if norm.weight is not None:
            wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            parts = at_output * norm.normalise(wide) * norm.scale  # (B, T, ..., dim): what each row adds
            if norm.weight.numel() < norm.dim:
                parts = parts.sum(-1, keepdim=True)
            parts = parts.flatten(2, -2).sum(2) if parts.ndim > 3 else parts  # heads share a gain
            self.add(f"{path}.gain", parts, parts[self.real].sum(0))

    def add(self, point: str, values: Tensor, whole: Tensor | None = None) -> None:
        """values: (B, T, ...). whole: what `rms` is over, if not all values."""
        by_token = values.float().flatten(2).square().mean(-1).sqrt()
        self.by_token[point] = by_token.masked_fill(~self.real, torch.nan)
        self.rms[point] = float((by_token[self.real] if whole is None else whole.float()).square().mean().sqrt())

    def table(self) -> Gradients:
        """The norms in the order of the forward pass, then the stream by point and layer."""
        norms = [f"{path}.{part}" for path in slots(self.model) for part in _PARTS]
        stream = [f"layers.{i}.{point}" for point in _STREAM for i in range(len(self.model.layers))]
        points = {point: self.by_token[point] for point in [*norms, *stream] if point in self.by_token}
        rows = [Gradient(point, self.rms[point], *first_and_median(v, self.real)) for point, v in points.items()]
        return Gradients(rows, points)
