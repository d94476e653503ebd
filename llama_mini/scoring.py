"""Log-probabilities of given tokens: the one place that computes them."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Raw log-softmax in nats, at most 0: logits (..., V) and the token of each row (...) int64 -> (...)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
