"""Which matrices of a checkpoint are held in memory as codes, in which format, and how many bytes that takes."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llama_mini.checkpoint.code_formats import code_format, common_format, holds_codes
from llama_mini.checkpoint.keys import EMBEDDING, HEAD, IGNORED_TENSORS, to_file_name
from llama_mini.checkpoint.source import Source, StoredTensor
from llama_mini.errors import RequestError
from llama_mini.machine import dtype_name
from llama_mini.model.config import LlamaConfig
from llama_mini.validate import check_choice

SETTINGS = ("auto", "none", "int8", "int4")  # of `quantize`


def check_quantize(quantize: str | None) -> None:
    """Raises RequestError for what is no setting of `quantize`; None is "auto"."""
    if quantize is not None:
        check_choice("quantize", quantize, SETTINGS, RequestError)


def quantize_for(source: Source, quantize: str | None, dtype: torch.dtype | str, device: torch.device) -> str:
    """The setting that applies: "auto" is "none" where the file has floats alone, or where floats are asked for.

    They are asked for by an explicit dtype. Other devices than the CPU have no operators for codes, so they too get
    floats. Raises RequestError.
    """
    check_quantize(quantize)
    if quantize not in (None, "auto"):
        return str(quantize)
    floats = dtype_name(dtype).lower() != "auto" or device.type != "cpu"
    return "none" if floats or not weight_formats(source, "auto") else "auto"


def weight_formats(source: Source, quantize: str) -> dict[str, str]:
    """The format of each matrix that is held as codes, by the parameter's name; all others are floats.

    "auto" takes the format that a tensor says it is kept in. Gate and up, which a fast model joins into one matrix, get
    a common format, so that none loses bits.
    """
    if quantize != "auto":
        return uniform_formats(source.config, quantize)
    formats: dict[str, str] = {}
    for group in _joined(source.config):
        found = _found(source, group)
        if found and all(stored.kept for stored in found.values()):
            kept = {name: str(stored.kept) for name, stored in found.items()}
            if not _in_one_order(found):
                formats |= dict.fromkeys(group, "int8")
            elif group[0].endswith("attention.q_proj.weight"):
                formats |= kept
            else:
                formats |= dict.fromkeys(group, common_format(kept.values()))
    return formats


def column_orders(source: Source, formats: Mapping[str, str]) -> dict[str, Tensor]:
    """By the parameter's name, the order of the columns of each matrix whose codes are kept in another than the plain.

    It is one for all parts of a matrix that a fast model joins: they read the same input.
    """
    orders: dict[str, Tensor] = {}
    for group in _joined(source.config):
        found = _found(source, group)
        held = [s.order for name, s in found.items() if s.order is not None and keeps_codes(s, formats.get(name), True)]
        if held and len(held) == len(found) and _in_one_order(found):
            orders |= dict.fromkeys(group, held[0])
    return orders


def keeps_codes(stored: StoredTensor, kind: str | None, in_order: bool) -> bool:
    """Whether a matrix that is held in the format `kind` has the file's own codes. If not, it is quantised again.

    in_order: whether its columns have the file's order, one of `column_orders`.
    """
    if kind is None or stored.kept is None or not stored.has_codes:
        return False
    return holds_codes(kind, stored.kept) and (stored.order is None or in_order)


def uniform_formats(config: LlamaConfig, quantize: str | None) -> dict[str, str]:
    """One format for all matrices; beside matrices of 4 bits the head has 8. None and "none" quantise nothing."""
    if quantize in (None, "none"):
        return {}
    names = [name for group in _joined(config) for name in group]
    formats = dict.fromkeys(names, str(quantize))
    if not config.tie_word_embeddings:
        del formats[EMBEDDING]
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    return formats | {head: "int8" if quantize == "int4" else str(quantize)}


def weight_bytes(source: Source, dtype: torch.dtype, quantize: str) -> int:
    """Bytes of the weights in memory, their padding aside; counted in the file's headers."""
    stored = [tensor for name, tensor in source.tensors.items() if not IGNORED_TENSORS.search(name)]
    floats, codes = sum(math.prod(tensor.shape) for tensor in stored), 0
    for name, kind in weight_formats(source, quantize).items():
        if (tensor := _stored(source, name)) is not None:
            floats -= math.prod(tensor.shape)
            codes += code_format(kind).n_bytes(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return floats * dtype.itemsize + codes


def _joined(config: LlamaConfig) -> Iterator[list[str]]:
    """The names of all matrices, in one list those that a fast model joins into one. Not every model has each."""
    for i in range(config.n_layers):
        for names in ("attention q k v", "attention o", "feed_forward gate up", "feed_forward down"):
            branch, *projections = names.split()
            yield [f"layers.{i}.{branch}.{projection}_proj.weight" for projection in projections]
    yield [EMBEDDING]
    if not config.tie_word_embeddings:
        yield [HEAD]


def _found(source: Source, group: Sequence[str]) -> dict[str, StoredTensor]:
    return {name: stored for name in group if (stored := _stored(source, name)) is not None}


def _in_one_order(found: Mapping[str, StoredTensor]) -> bool:
    """Whether the codes of all these parts have their columns in one order: the plain one for embedding and head."""
    orders = [stored.order for stored in found.values()]
    if orders[0] is None or EMBEDDING in found or HEAD in found:
        return all(order is None for order in orders)
    return all(order is not None and torch.equal(order, orders[0]) for order in orders)


def _stored(source: Source, name: str) -> StoredTensor | None:
    """The file's tensor of a parameter. A tied one may be stored under the head's name alone."""
    tensor = source.tensors.get(to_file_name(name, source.keys))
    if tensor is None and name == EMBEDDING and source.config.tie_word_embeddings:
        tensor = source.tensors.get(to_file_name(HEAD, source.keys))
    return tensor
