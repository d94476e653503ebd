"""The texts that the lab reads: token ids in any form, as one batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_mini.errors import RequestError
from llama_mini.model.llama import Llama
from llama_mini.validate import check_token_ids


class Texts(NamedTuple):
    """One text per row. Short ones are padded on the right, by their last token: no token looks to its right.

    tokens: (B, T) int64. real: (B, T) bool, False for padding, which every statistic leaves out.
    """

    tokens: Tensor
    real: Tensor


Ids = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | Texts


def as_texts(model: Llama, ids: Ids, at_least: int = 2) -> Texts:
    """Token ids, (T,), (B, T) or a list of texts of any lengths, on the model's device.

    Raises RequestError if a text has fewer than `at_least` tokens, or an id is unknown.
    """
    if model.device.type == "meta":
        raise RequestError("the model is on the meta device, where it has no weights: load it on cpu or cuda")
    rows = [ids.tokens[i][real] for i, real in enumerate(ids.real)] if isinstance(ids, Texts) else _rows(ids)
    for row in rows:
        if row.is_floating_point() or row.is_complex() or row.dtype is torch.bool:
            raise RequestError(f"token ids must be whole numbers, not {row.dtype}")
        if row.ndim != 1 or len(row) < at_least:
            raise RequestError(f"each text must be (T,) token ids, T at least {at_least}, not {tuple(row.shape)}")
        check_token_ids((int(row.min()), int(row.max())), model.config.vocab_size, RequestError)
    longest = max(map(len, rows))
    tokens = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])
    real = torch.tensor([[i < len(row) for i in range(longest)] for row in rows], device=model.device)
    return Texts(tokens.to(model.device, torch.int64), real)


def _rows(ids: Any) -> list[Tensor]:
    several = isinstance(ids, list | tuple) and any(isinstance(one, Sequence) or _n_dims(one) for one in ids)
    try:
        rows = [torch.as_tensor(one, device="cpu") for one in ids] if several else [torch.as_tensor(ids, device="cpu")]
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"token ids must be a tensor or list of whole numbers: {error}") from None
    if not several and rows[0].ndim == 2:
        rows = list(rows[0])
    if not rows:
        raise RequestError("there is no text: give the token ids of at least one")
    return rows


def _n_dims(value: Any) -> int:
    return getattr(value, "ndim", 0)
