"""Compares the tensors of a checkpoint with the parameters of its model, and reads those that match."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama_mini.checkpoint.keys import EMBEDDING, HEAD, IGNORED_TENSORS, to_file_name
from llama_mini.checkpoint.source import Destination, Rows, Source, Values, no_destination
from llama_mini.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError, warn
from llama_mini.validate import join_names

Model = TypeVar("Model", bound=nn.Module)  # built from a LlamaConfig alone


def empty_model(cls: type[Model], source: Source) -> Model:
    """The model on the meta device: shapes without memory. Raises CheckpointMismatchError, ConfigError."""
    config = source.config
    if config.n_layers > len(source.tensors):  # refused before a model of a billion layers is built
        both = f"{config.n_layers} layers, but holds {len(source.tensors)} tensors in all"
        raise CheckpointMismatchError(f"{source.path} asks for {both}")
    try:
        with torch.device("meta"):
            return cls(config)
    except RuntimeError as error:  # a size beyond 64 bits
        raise ConfigError(f"{source.path}: no model of these sizes can be built: {error}") from None


def match(model: nn.Module, source: Source) -> dict[str, str]:
    """Name in the file -> ours, for every parameter, in the order of the files.

    Raises CheckpointMismatchError that names every missing, unexpected and misshaped tensor at once.
    """
    expected = {to_file_name(name, source.keys): (name, tuple(p.shape)) for name, p in model.named_parameters()}
    head, embedding = to_file_name(HEAD, source.keys), to_file_name(EMBEDDING, source.keys)
    if head not in expected and head in source.tensors and embedding not in source.tensors:
        expected[head] = expected.pop(embedding)  # tied, and stored once under the name of the head
    ignored = {name for name in source.tensors if IGNORED_TENSORS.search(name)}
    shapes = {name: stored.shape for name, stored in source.tensors.items() if name not in ignored or name in expected}
    faults = []
    if missing := sorted(set(expected) - set(shapes)):
        alone = "; without its head, a model gives vectors and generates no text" if missing == [head] else ""
        faults.append(f"{len(missing)} missing: {join_names(missing)}{alone}")
    others = sorted(set(shapes) - set(expected))
    if zeros := [name for name in others if name.endswith(".bias") and _is_zero(source, name)]:
        warn(f"{source.path}: {join_names(zeros)} left out: biases of zeros, which the model does not have")
    if unexpected := [name for name in others if name not in zeros]:
        faults.append(f"{len(unexpected)} unexpected: {join_names(unexpected)}")
    if misshaped := sorted(name for name in set(expected) & set(shapes) if expected[name][1] != shapes[name]):
        both = [f"{name} is {shapes[name]}, not {expected[name][1]}" for name in misshaped]
        faults.append(f"{len(misshaped)} misshaped: {join_names(both)}")
    if faults:
        raise CheckpointMismatchError(f"{source.path}: the tensors do not match the configuration: {'; '.join(faults)}")
    return {name: expected[name][0] for name in source.tensors if name in expected}


def _is_zero(source: Source, name: str) -> bool:
    """Whether a tensor is of zeros, as the biases are that GPTQ's tools write."""
    return not any(rows.any() for *_, rows in source.read([name], torch.float32))


def read_all(
    source: Source,
    names: Mapping[str, str],
    dtype: torch.dtype,
    what: str,
    delay: float = 1,
    destination: Destination | None = None,
    whole: bool = False,
) -> Iterator[Rows[Tensor]]:
    """Reads the tensors that `match` found, under our names, with a progress bar; arguments as in `Source.read`.

    Raises CheckpointFormatError where a norm or a bias is not finite: every answer would be NaN.
    """
    rows = source.read(names.keys(), dtype, destination, whole)
    for name, first, values in with_progress(rows, len(names), what, delay):
        if values.ndim == 1 and not torch.isfinite(values).all():
            raise CheckpointFormatError(f"{source.tensors[name].file}: {name} holds NaN or infinity; download it again")
        yield names[name], first, values
        del values  # before the next ones are read


def with_progress(rows: Iterator[Rows[Values]], total: int, what: str, delay: float = 1) -> Iterator[Rows[Values]]:
    """The same rows, with a bar that counts tensors and appears on a terminal after `delay` seconds."""
    with tqdm(total=total, desc=what, unit="tensor", delay=delay, leave=False, disable=None) as bar:
        for item in rows:
            is_new = item[1] == 0
            yield item
            del item  # before the next one is read
            bar.update(is_new)


def with_settled_head(source: Source) -> Source:
    """The source, tied or not as its tensors are. `tie_word_embeddings` may be true although the file has a head.

    A head that equals the embedding is left out. One that differs is used, with a warning, as in transformers and vLLM:
    fine-tunes that train the head often keep the setting of their base. The two are compared chunk by chunk, up to the
    first that differs, so a few MB are in memory, and only equal ones are read to the end.
    """
    head, embedding = to_file_name(HEAD, source.keys), to_file_name(EMBEDDING, source.keys)
    if not source.config.tie_word_embeddings or not {head, embedding} <= set(source.tensors):
        return source
    both = (source.read_rows([name], source.dtype, no_destination, False) for name in (head, embedding))
    same_shape = source.tensors[head].shape == source.tensors[embedding].shape
    if same_shape and all(_same(a, b) for (*_, a), (*_, b) in zip(*both, strict=True)):
        return replace(source, tensors={name: stored for name, stored in source.tensors.items() if name != head})
    warn(f"{source.path}: {head} differs from the embedding, so it is used, although tie_word_embeddings is true")
    return replace(source, config=replace(source.config, tie_word_embeddings=False))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:  # rounded to one of the two, different values might be equal
        return torch.equal(a.double(), b.double())
    # NumPy compares bytes forty times faster than torch.equal compares bfloat16: as fast as they are read.
    first, second = (values.contiguous().view(-1).view(torch.uint8).numpy() for values in (a, b))
    return np.array_equal(first, second)
