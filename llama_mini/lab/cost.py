"""The cost of a change to a model: its loss on a text, and how far its predictions differ from those before."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_mini.engine.logprobs import LOGITS_AT_ONCE, kl_divergence, token_logprobs
from llama_mini.engine.runner import first_nonfinite
from llama_mini.errors import NumericalError, RequestError
from llama_mini.lab.recording import as_tokens
from llama_mini.model.llama import Llama


@dataclass(frozen=True, eq=False)
class Score:
    """The loss of a model on a text, and the differences from a base.

    Attributes:
        tokens: the text, (B, T) int64.
        loss: mean negative log-likelihood in nats, over all tokens but the first of each sequence.
        logits: (B, T, V) float32, float64 for a float64 model.
        dloss: loss minus that of the base; None without a base.
        kl: KL(base ‖ this), the mean over positions, in nats; None without a base.
        top1: share of positions where both have the same likeliest token; None without a base.
    """

    tokens: Tensor
    loss: float
    logits: Tensor
    dloss: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64, device="cpu").exp())

    def __repr__(self) -> str:
        moved = "" if self.dloss is None else f", dloss={self.dloss:+.4f}, kl={self.kl:.4g}, top1={self.top1:.4f}"
        return f"Score(loss={self.loss:.4f}, perplexity={self.perplexity:.4g}{moved})"


def score(model: Llama, ids: Tensor | Sequence[int], against: Score | None = None) -> Score:
    """Scores token ids, (T,), (B, T) or a list. `against`: a base, an earlier score of the same ids to compare with.

    Raises RequestError if there is no token to predict, or if text or vocabulary differ from the base's;
    NumericalError, naming the first module and token, if the logits hold NaN or infinity.
    """
    tokens = as_tokens(model, ids)
    if against is not None and not torch.equal(against.tokens.cpu(), tokens.cpu()):
        raise RequestError(
            f"the base has another text, {_size(against.tokens)}, than this score, {_size(tokens)}: score the same ids"
        )
    with torch.inference_mode():
        logits = model(tokens)
        if not all(part.isfinite().all() for part in _in_parts(logits.flatten(0, 1))):
            # Hooks make an operator that computes several modules step aside, and with it perhaps its fault.
            first = first_nonfinite(model, map(model, [tokens])) or "an operator that computes several modules"
            raise NumericalError(f"NaN or infinity in the logits, first at {first}")
        loss = _loss(logits, tokens)
    if against is None:
        return Score(tokens, loss, logits)
    if against.logits.shape != logits.shape:
        raise RequestError(f"the base has a vocabulary of {against.logits.shape[-1]}, this model {logits.shape[-1]}")
    kl, same = 0.0, 0
    for p, q in zip(_in_parts(against.logits.flatten(0, 1)), _in_parts(logits.flatten(0, 1)), strict=True):
        kl += float(kl_divergence(p, q).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return Score(tokens, loss, logits, loss - against.loss, kl / tokens.numel(), same / tokens.numel())


def _loss(logits: Tensor, tokens: Tensor) -> float:
    total = 0.0
    for x, ids in zip(logits[:, :-1], tokens[:, 1:], strict=True):
        for pair in zip(_in_parts(x), _in_parts(ids), strict=True):
            total -= float(token_logprobs(*pair).double().sum())
    return total / tokens[:, 1:].numel()


def _in_parts(x: Tensor) -> tuple[Tensor, ...]:
    """The rows in parts: a log-softmax of all logits at once would take as much memory again."""
    return x.split(LOGITS_AT_ONCE)


def _size(tokens: Tensor) -> str:
    return " × ".join(map(str, tokens.shape))
