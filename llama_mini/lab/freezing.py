"""Norms that divide by a constant, measured on texts, in the place of each token's own root mean square."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.lab.keep import Keep, Reading, as_keep
from llama_mini.lab.recording import watched
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama
from llama_mini.model.norm import Norm, RMSNorm
from llama_mini.validate import check_token_ids

FREEZABLE = ("rms", "scale")  # kinds that divide by the root mean square
FREEZE = ("quadratic", "arithmetic", "median", "token")


class Frozen(RMSNorm):
    """RMSNorm whose reciprocal root is a constant, 1/c: one number for all rows, or (B, T, ..., 1), by position.

    keep: tokens that keep their own statistic. median: that of the tokens' RMS where c was measured. reading: follows
    what the model reads.
    """

    kind = "frozen"
    inverse_root: Tensor

    def __init__(self, norm: Norm, inverse_root: Tensor, keep: Keep, median: float, reading: Reading) -> None:
        super().__init__(norm.dim, norm.eps, gain=norm.gain, cast=norm.cast, scale=norm.scale, device="meta")
        self.weight = norm.weight
        self.register_buffer("inverse_root", inverse_root, persistent=False)
        self.keep, self.median, self.reading = keep, median, reading

    def normalise(self, wide: Tensor) -> Tensor:
        normed = wide * self._inverse_root_for(wide)
        kept = self.keep.mask(_token_rms(_energy(wide)), self.median, self.reading)
        normed[kept] = super().normalise(wide[kept])
        return normed

    def _inverse_root_for(self, wide: Tensor) -> Tensor:
        root = self.inverse_root
        if root.ndim == 0:
            return root
        n_read = int(self.reading.positions.max()) + 1
        if root.shape[0] not in (1, wide.shape[0]) or root.shape[1] < n_read:
            raise RequestError(
                f"a norm frozen by token was measured on {root.shape[0]} texts of {root.shape[1]} tokens and reads "
                f"{wide.shape[0]} of {n_read}: score the text it was measured on"
            )
        return root[torch.arange(root.shape[0], device=root.device)[:, None], self.reading.positions]


def frozen_norms(model: Llama, norms: Mapping[str, tuple[Any, Mapping[str, Any]]], ids: Ids) -> dict[str, Frozen]:
    """The frozen norms by path, for norms with the settings `freeze` and `keep`. Their inputs are the model's on `ids`.

    Raises RequestError for a position or id to keep that cannot occur, or if no token is left to measure.
    """
    texts, reading, energies = as_texts(model, ids), Reading(), dict[str, Tensor]()
    keeps = {path: as_keep(settings.get("keep", "first")) for path, (_, settings) in norms.items()}
    for keep in keeps.values():
        check_token_ids(keep.ids, model.config.vocab_size, RequestError)
        if (last := max(keep.positions, default=0)) >= (n := texts.tokens.shape[1]):
            raise RequestError(f"keep: there is no position {last} in a text of {n} tokens, which begin at 0")

    def record(path: str, x: Tensor, _: Tensor) -> None:
        energies[path] = _energy(x.to(torch.promote_types(x.dtype, torch.float32)))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(reading.follows(model, tokens=True))
        stack.enter_context(watched({path: model.get_submodule(path) for path in norms}, record))
        model(texts.tokens)
    return {
        path: _frozen(norm, settings["freeze"], keeps[path], energies[path], texts, reading)
        for path, (norm, settings) in norms.items()
    }


def _frozen(norm: Norm, freeze: str, keep: Keep, energy: Tensor, texts: Texts, reading: Reading) -> Frozen:
    rms = _token_rms(energy)
    median = float(rms[texts.real].double().quantile(0.5))
    if freeze == "token":
        return Frozen(norm, torch.rsqrt(energy + norm.eps), keep, median, reading)
    counted = texts.real & ~keep.mask(rms, median, reading)
    if not counted.any():
        raise RequestError("keep leaves no token to measure the statistic on: keep fewer, or give a longer text")
    square = energy[counted].double() + norm.eps
    match freeze:
        case "quadratic":
            constant = square.mean().sqrt()
        case "arithmetic":
            constant = square.sqrt().mean()
        case _:
            constant = square.sqrt().quantile(0.5)
    return Frozen(norm, (1 / constant).to(energy.dtype), keep, median, reading)


def _energy(wide: Tensor) -> Tensor:
    """The mean square of each vector, as RMSNorm computes it: (B, T, ..., C) -> (B, T, ..., 1)."""
    return wide.pow(2).mean(-1, keepdim=True)


def _token_rms(energy: Tensor) -> Tensor:
    """The RMS of each token, in q and k norms over its heads: (B, T, ..., 1) -> (B, T)."""
    return energy.flatten(2).mean(-1).sqrt()
