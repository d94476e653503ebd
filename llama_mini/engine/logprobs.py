"""Log-probabilities of tokens: the one place that computes them."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Raw log-softmax in nats, at most 0: logits (..., V) and the token of each row (...) int64 -> (...)."""
    return _logprobs(logits).gather(-1, tokens[..., None])[..., 0]


def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids (..., k) int64 of the k likeliest tokens and their raw log-softmax in nats, the likeliest first.

    Of equal ones the lower id comes first; all V when k is more.
    """
    logprobs = _logprobs(logits)
    k = min(k, logits.shape[-1])
    ids = torch.empty(*logits.shape[:-1], k, dtype=torch.int64, device=logits.device)
    for best, row in zip(ids.view(-1, k), logprobs.view(-1, logits.shape[-1]), strict=True):
        best.copy_(_largest(row, k))
    return ids, logprobs.gather(-1, ids)


def _logprobs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _largest(row: Tensor, k: int) -> Tensor:
    # topk takes any of those that equal the k-th, in any order: all of them are sorted, and no other.
    candidates = (row >= row.topk(k).values.min()).nonzero()[:, 0]
    return candidates[row[candidates].argsort(descending=True, stable=True)][:k]
