"""The cost of a change to a model: its loss on texts, and how far its predictions differ from those before."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_mini.engine.finite import first_nonfinite
from llama_mini.engine.logprobs import LOGITS_AT_ONCE, kl_divergence, token_logprobs
from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.texts import Ids, Texts, as_texts
from llama_mini.model.llama import Llama

_ENOUGH_TEXTS = 8
_KL_AT_ONCE = 2**18  # logits: in float64 they stay in the processor's cache, which is four times as fast


@dataclass(frozen=True, eq=False)
class Score:
    """The loss of a model on texts, and the differences from a base. Padding counts nowhere.

    Attributes:
        texts: the texts as a batch.
        loss: mean negative log-likelihood in nats, over all tokens but the first of each text.
        losses: that of each token, (B, T - 1) float64; NaN where the text has ended.
        logits: (B, T, V) float32, float64 for a float64 model.
        dloss: loss minus that of the base; None without a base.
        se: the standard error of dloss. The same tokens are scored twice, so it is that of a mean of differences: the
            standard deviation of the tokens' differences over √tokens. Tokens of one text depend on each other, so
            from 8 texts on it is the same over the texts' mean differences, weighted by their numbers of tokens. NaN
            for a single token; None without a base.
        kl: KL(base ‖ this), the mean over positions, in nats; None without a base.
        top1: share of positions where both have the same likeliest token; None without a base.
    """

    texts: Texts
    loss: float
    losses: Tensor
    logits: Tensor
    dloss: float | None = None
    se: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64, device="cpu").exp())

    def __repr__(self) -> str:
        moved = ""
        if self.dloss is not None:
            moved = f", dloss={self.dloss:+.4f} ± {self.se:.2g}, kl={self.kl:.4g}, top1={self.top1:.4f}"
        return f"Score(loss={self.loss:.4f}, perplexity={self.perplexity:.4g}{moved})"


def score(model: Llama, ids: Ids, against: Score | None = None) -> Score:
    """Scores token ids: (T,), (B, T) or a list of texts. `against`: an earlier score of the same ids to compare with.

    Raises RequestError if there is no token to predict, or if texts or vocabulary differ from the base's;
    NumericalError, naming the first module and token, if the logits hold NaN or infinity.
    """
    texts = as_texts(model, ids)
    if against is not None and not all(map(_same, against.texts, texts)):
        raise RequestError(
            f"the base has another text, {_size(against.texts)}, than this score, {_size(texts)}: score the same ids"
        )
    with torch.inference_mode():
        logits = model(texts.tokens)
        if not logits.sum().isfinite() and not all(part.isfinite().all() for part in _in_parts(logits, texts)):
            # Hooks make an operator that computes several modules step aside, and with it perhaps its fault.
            first = first_nonfinite(model, map(model, [texts.tokens]))
            where = first or "an operator that computes several modules"
            raise NumericalError(f"NaN or infinity in the logits, first at {where}")
        losses = _losses(logits, texts)
    loss = float(losses.nanmean())
    if against is None:
        return Score(texts, loss, losses, logits)
    if against.logits.shape != logits.shape:
        raise RequestError(f"the base has a vocabulary of {against.logits.shape[-1]}, this model {logits.shape[-1]}")
    kl, same, n = 0.0, 0, int(texts.real.sum())
    at_once = max(1, _KL_AT_ONCE // logits.shape[-1])
    for p, q in zip(*(_in_parts(x, texts, at_once) for x in (against.logits, logits)), strict=True):
        kl += float(kl_divergence(p, q).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    se = standard_error(losses - against.losses)
    return Score(texts, loss, losses, logits, loss - against.loss, se, kl / n, same / n)


def standard_error(differences: Tensor) -> float:
    """That of the mean of (B, N) numbers, NaN where a text has none: see Score.se."""
    apart = differences - differences.nanmean()
    if len(apart) < _ENOUGH_TEXTS:
        apart = apart[~apart.isnan()][:, None]
    n = int((~apart.isnan()).sum())
    groups = len(apart)
    return math.sqrt(float(apart.nansum(1).square().sum()) * groups / (groups - 1)) / n if groups > 1 else math.nan


def _losses(logits: Tensor, texts: Texts) -> Tensor:
    predicted = Texts(texts.tokens[:, 1:], texts.real[:, 1:])
    pairs = zip(_in_parts(logits, predicted), _in_parts(predicted.tokens, predicted), strict=True)
    losses = torch.full(predicted.real.shape, torch.nan, dtype=torch.float64, device=logits.device)
    losses[predicted.real] = -torch.cat([token_logprobs(*pair).double() for pair in pairs])
    return losses


def _in_parts(x: Tensor, texts: Texts, tokens: int = LOGITS_AT_ONCE) -> Iterator[Tensor]:
    """The rows (B, T, ...) without padding, in parts: a log-softmax of all logits would take as much memory again."""
    for row, real in zip(x, texts.real, strict=True):
        yield from row[: int(real.sum())].split(tokens)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.cpu(), other.cpu())


def _size(texts: Texts) -> str:
    return " × ".join(map(str, texts.tokens.shape))
