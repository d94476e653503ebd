"""Scoring a text: the logits that predict its tokens, their log-probabilities, and the divergence of two models."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llama_mini.memory import PREFILL_CHUNK
from llama_mini.model.kv_cache import KVCache
from llama_mini.model.llama import Llama

LOGITS_AT_ONCE = 128  # tokens; in float64, the logits of one token of a large vocabulary take a megabyte


@torch.inference_mode()
def hidden_states(model: Llama, ids: Sequence[int], cache: KVCache) -> Iterator[Tensor]:
    """Runs `ids` in chunks, after the tokens in a cache of one row; yields the hidden states (T, C) of each chunk."""
    tokens = torch.tensor([ids], dtype=torch.int64, device=model.device)
    for part in _parts(tokens, PREFILL_CHUNK, 1):
        yield model.hidden(part.contiguous(), cache)[0]


@torch.inference_mode()
def split_logits(model: Llama, x: Tensor) -> Iterator[Tensor]:
    """Yields the logits (N, V) of hidden states (T, C), at most LOGITS_AT_ONCE tokens at a time."""
    for part in _parts(x, LOGITS_AT_ONCE):
        yield model.logits(part)


def predictions(model: Llama, ids: Sequence[int], first: int, cache: KVCache) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ids[first:] in parts: the logits (N, V) that predict N tokens, and these tokens (N,) int64.

    `first` is at least 1, since nothing predicts the first token. The last token is not fed to the model.
    """
    tokens = torch.tensor(ids[first:], dtype=torch.int64, device=model.device)
    skip = first - 1
    for x in hidden_states(model, ids[:-1], cache):
        for logits in split_logits(model, x[skip:]):
            yield logits, tokens[: len(logits)]
            tokens = tokens[len(logits) :]
        skip = max(0, skip - len(x))


def _parts(x: Tensor, most: int, dim: int = 0) -> Iterator[Tensor]:
    """x in equal parts of at most so many tokens: a part of one token would be rounded as decoding rounds."""
    n = x.shape[dim]
    yield from x.tensor_split(-(-n // most), dim) if n else ()


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Raw log-softmax of tokens (...) int64 under logits (..., V), in nats, at most 0 -> (...)."""
    return _logprobs(logits).gather(-1, tokens[..., None])[..., 0]


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ logits) of each token in nats: (..., V) twice -> (...) float64, at least 0, NaN for NaN."""
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # rounding can take it below 0


def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens, ids (..., k) int64 and raw log-softmax (..., k) in nats, the likeliest first.

    Equally likely tokens are ordered by id. If k exceeds the vocabulary, all V are returned.
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
    # On a tie topk picks any tokens, in any order. So all that are at least the k-th are sorted, and only these.
    candidates = (row >= row.topk(k).values.min()).nonzero()[:, 0]
    return candidates[row[candidates].argsort(descending=True, stable=True)][:k]
