"""The texts of `heal`: English that every machine with Python has, and what the model itself writes."""

import hashlib
import statistics
from collections.abc import Iterable
from contextlib import suppress
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from llama_mini.checkpoint.io.atomic import new_file
from llama_mini.lab.study import progress
from llama_mini.lab.training import sample_text
from llama_mini.machine import as_dtype, user_cache
from llama_mini.model.llama import Llama
from llama_mini.tokenizer import Tokenizer

LENGTH = 256  # tokens of a row
HELD_OUT = 8  # rows; from eight texts on, the standard error is that over texts
_SAMPLES, _SAMPLE_SEED = 64, 0


def training_text(tokenizer: Tokenizer) -> Tensor:
    """Python's own language reference, which `help()` shows: 465 kB of English and a little code. (T,) int64."""
    from pydoc_data.topics import topics  # late: it takes a tenth of a second

    return torch.tensor(tokenizer.encode("\n".join(topics.values())))


def held_out_texts(tokenizer: Tokenizer, length: int) -> list[Tensor]:
    """Eight rows (T,) that are not trained on: four of the lab's novel, four of the docstrings of `statistics`."""
    documented = (statistics, *(getattr(statistics, name) for name in statistics.__all__))
    texts = (sample_text(), "\n\n".join(each.__doc__ or "" for each in documented))
    starts = (torch.tensor(tokenizer.encode(text)[: HELD_OUT // 2 * length]) for text in texts)
    return [row for start in starts for row in start.split(length) if len(row) > 1]


def rows_of(texts: Iterable[Tensor], length: int) -> Tensor:
    """Texts (T,) cut into rows (N, length). The end of a text that fills no row is left out."""
    rows = [text[: len(text) // length * length].view(-1, length) for text in texts]
    return torch.cat([torch.empty(0, length, dtype=torch.int64), *rows])


def samples(model: Llama, length: int) -> Tensor:
    """What the model writes at temperature 1 after its first token, (64, length): made once, then read from the cache.

    A model without a BOS token starts from random ones.
    """
    name = f"{fingerprint(model.parameters())[:32]}-{length}.npy"
    file = user_cache() / "samples" / name
    with suppress(OSError, ValueError, EOFError):
        tokens = torch.from_numpy(np.load(file, allow_pickle=False).astype(np.int64))
        if tokens.shape == (_SAMPLES, length) and (tokens.clamp(0, model.config.vocab_size - 1) == tokens).all():
            return tokens
    tokens = _sampled(model, length)
    with suppress(OSError):  # without a cache the samples are made again
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_file(file) as made, made.open("wb") as stream:
            np.save(stream, tokens.numpy())
    return tokens


@torch.no_grad()
def _sampled(model: Llama, length: int) -> Tensor:
    config, generator = model.config, torch.Generator().manual_seed(_SAMPLE_SEED)
    model = deepcopy(model).to(as_dtype("auto", model.device))
    tokens = torch.randint(config.vocab_size, (_SAMPLES, length), generator=generator)
    if config.bos_id is not None:
        tokens[:, 0] = config.bos_id
    cache = model.new_cache(_SAMPLES, length)
    for i in progress(range(1, length), "the model writes a text", unit="token"):
        logits = model(tokens[:, i - 1 : i].to(model.device), cache)[:, -1]
        tokens[:, i] = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return tokens


def fingerprint(tensors: Iterable[Tensor], text: str = "") -> str:
    """The SHA-256 of a text, and of the tensors' shapes, dtypes and bits."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
