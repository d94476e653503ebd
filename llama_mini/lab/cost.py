"""What a change costs: the loss of a text, and how far the predictions moved from those of the model as it was."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_mini.engine.logprobs import token_logprobs
from llama_mini.errors import RequestError
from llama_mini.model.llama import Llama

_ROWS_AT_ONCE = 256  # of log-softmax: a whole text of a large vocabulary would double the memory of its logits
_NO_INTEGER = (torch.bool, torch.complex32, torch.complex64, torch.complex128)


@dataclass(frozen=True, eq=False)
class Score:
    """
    tokens: the text, (B, T) int64.
    loss: mean negative log-likelihood of each token but the first of its row, in nats.
    logits: (B, T, V) float32 (float64 for a float64 model).
    dloss: loss less that of the base; kl: mean KL(base ‖ this) over positions, in nats; top1: share of positions whose
        likeliest token is the base's. None without a base; NaN logits make loss and KL NaN.
    """

    tokens: Tensor
    loss: float
    logits: Tensor
    dloss: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    def __repr__(self) -> str:
        moved = "" if self.dloss is None else f", dloss={self.dloss:+.4f}, kl={self.kl:.4g}, top1={self.top1:.4f}"
        return f"Score(loss={self.loss:.4f}, perplexity={self.perplexity:.4g}{moved})"


def score(model: Llama, ids: Tensor | Sequence[int], against: Score | None = None) -> Score:
    """The loss of token ids, (T,), (B, T) or a list; `against` an earlier score of the same ids, the change too.

    Raises RequestError where there is no token to predict, or the base is of another text or vocabulary.
    """
    tokens = as_tokens(model, ids)
    if against is not None and not torch.equal(against.tokens.cpu(), tokens.cpu()):
        raise RequestError(
            f"the base is of another text, {_size(against.tokens)}, than this one, {_size(tokens)}: score one text"
        )
    with torch.inference_mode():
        logits = model(tokens)
        loss = _loss(logits, tokens)
    if against is None:
        return Score(tokens, loss, logits)
    if against.logits.shape != logits.shape:
        raise RequestError(f"the base has a vocabulary of {against.logits.shape[-1]}, this model {logits.shape[-1]}")
    kl, top1 = _moved(against.logits.flatten(0, 1), logits.flatten(0, 1))
    return Score(tokens, loss, logits, loss - against.loss, kl, top1)


def as_tokens(model: Llama, ids: Tensor | Sequence[int], at_least: int = 2) -> Tensor:
    """(B, T) int64 on the model's device, T at least `at_least`, of tokens that it knows. Raises RequestError."""
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"token ids are a tensor or a list of whole numbers: {error}") from None
    if tokens.is_floating_point() or tokens.dtype in _NO_INTEGER:
        raise RequestError(f"token ids are whole numbers, not {tokens.dtype}")
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < at_least:
        raise RequestError(f"token ids are (T,) or (B, T), T at least {at_least}, not {tuple(tokens.shape)}")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise RequestError(f"a token id lies outside the vocabulary of {model.config.vocab_size}")
    return tokens.to(device=model.device, dtype=torch.int64)


def _loss(logits: Tensor, tokens: Tensor) -> float:
    rows = zip(logits[:, :-1], tokens[:, 1:], strict=True)
    pieces = [zip(row.split(_ROWS_AT_ONCE), wanted.split(_ROWS_AT_ONCE), strict=True) for row, wanted in rows]
    total = sum(float(token_logprobs(*piece).double().sum()) for row in pieces for piece in row)
    return -total / tokens[:, 1:].numel()


def _size(tokens: Tensor) -> str:
    return " × ".join(map(str, tokens.shape))


def _moved(base: Tensor, other: Tensor) -> tuple[float, float]:
    """KL(base ‖ other) and the agreement of the likeliest, means over the rows of (N, V)."""
    kl, same = 0.0, 0
    for p, q in zip(base.split(_ROWS_AT_ONCE), other.split(_ROWS_AT_ONCE), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return kl / len(base), same / len(base)
