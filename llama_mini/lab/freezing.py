"""Norms that divide by a constant, measured on texts, in the place of each token's own root mean square."""

from collections.abc import Iterable, Mapping
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
MEANS = ("quadratic", "arithmetic", "median")
FREEZE = (*MEANS, "token")


class Frozen(RMSNorm):
    """RMSNorm whose reciprocal root is a constant, 1/c: one number for all rows, or (B, T, ..., 1), by position.

    keep: tokens that keep their own statistic; kept: those of the measured texts, (B, T) bool. median: of the tokens'
    RMS where c was measured. reading: follows what the model reads.
    """

    kind = "frozen"
    inverse_root: Tensor
    kept: Tensor

    def __init__(
        self, norm: Norm, inverse_root: Tensor, keep: Keep, kept: Tensor, median: float, reading: Reading
    ) -> None:
        super().__init__(norm.dim, norm.eps, gain=norm.gain, cast=norm.cast, scale=norm.scale, device="meta")
        self.weight = norm.weight
        self.register_buffer("inverse_root", inverse_root, persistent=False)
        self.register_buffer("kept", kept, persistent=False)
        self.keep, self.median, self.reading = keep, median, reading

    @property
    def knows_tokens(self) -> bool:
        return bool(self.keep.ids) or self.keep.times_median is not None

    def normalise(self, wide: Tensor) -> Tensor:
        normed = wide * self._inverse_root_for(wide)
        kept = self.kept
        if not (self.reading.is_measured and self.knows_tokens):
            rms = _token_rms(_energy(wide))
            kept = self.keep.mask(rms, self.median, self.reading.tokens, self.reading.positions)
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


def frozen_norms(
    model: Llama, norms: Mapping[str, tuple[Any, Mapping[str, Any]]], ids: Ids, calibrate: Ids | None = None
) -> dict[str, Frozen]:
    """The frozen norms by path, for norms with their settings, of which `freeze` and `keep` are read here.

    ids: the texts that the model will read; calibrate: those to measure the constants on, if they are others.

    Raises RequestError for a position or id to keep that cannot occur, or if no token is left to measure.
    """
    texts = as_texts(model, ids)
    keeps = {path: as_keep(settings.get("keep", "first")) for path, (_, settings) in norms.items()}
    for keep in keeps.values():
        check_token_ids(keep.ids, model.config.vocab_size, RequestError)
        if (last := max(keep.positions, default=0)) >= (n := texts.tokens.shape[1]):
            raise RequestError(f"keep: there is no position {last} in a text of {n} tokens, which begin at 0")
    reading, of_texts = Reading(texts.tokens), _energies(model, norms, texts)
    measured, energies = texts, of_texts
    if calibrate is not None:
        measured = as_texts(model, calibrate)
        energies = _energies(model, norms, measured)
    frozen = {}
    for path, (norm, settings) in norms.items():
        keep, energy = keeps[path], energies[path]
        median = float(_token_rms(energy)[measured.real].double().quantile(0.5))
        counted = measured.real & ~_kept(keep, energy, median, measured)
        if not counted.any():
            raise RequestError("keep leaves no token to measure the statistic on: keep fewer, or give a longer text")
        square = energy + norm.eps
        mean = settings["freeze"]
        root = square if mean == "token" else squared_constant(square[counted].double(), mean)
        kept = _kept(keep, of_texts[path], median, texts) & texts.real
        frozen[path] = Frozen(norm, root.rsqrt().to(square), keep, kept, median, reading)
    return frozen


def _energies(model: Llama, paths: Iterable[str], texts: Texts) -> dict[str, Tensor]:
    """mean(x²) of each vector that the norms read: (B, T, ..., 1)."""
    energies: dict[str, Tensor] = {}

    def record(path: str, x: Tensor, _: Tensor) -> None:
        energies[path] = _energy(x.to(torch.promote_types(x.dtype, torch.float32)))

    with torch.no_grad(), watched({path: model.get_submodule(path) for path in paths}, record):
        model(texts.tokens)
    return energies


def _kept(keep: Keep, energy: Tensor, median: float, texts: Texts) -> Tensor:
    positions = torch.arange(texts.tokens.shape[1], device=texts.tokens.device)[None]
    return keep.mask(_token_rms(energy), median, texts.tokens, positions)


def squared_constant(square: Tensor, mean: str) -> Tensor:
    """c² for the mean squares of the vectors, eps included."""
    if mean == "quadratic":
        return square.mean()
    return (square.sqrt().mean() if mean == "arithmetic" else square.sqrt().quantile(0.5)).square()


def _energy(wide: Tensor) -> Tensor:
    """The mean square of each vector, as RMSNorm computes it: (B, T, ..., C) -> (B, T, ..., 1)."""
    return wide.pow(2).mean(-1, keepdim=True)


def _token_rms(energy: Tensor) -> Tensor:
    """The RMS of each token, in q and k norms over its heads: (B, T, ..., 1) -> (B, T)."""
    return energy.flatten(2).mean(-1).sqrt()
