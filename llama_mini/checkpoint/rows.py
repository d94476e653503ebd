"""Where the rows of a file's tensors differ from the model's, solved once for every format, in both directions.

- Several parameters in one tensor, below each other. A key table names each as `NAME[PART]`: `qkv_proj.weight[q]` is
  the query part of Phi-3's `qkv_proj.weight`. `split_parts` makes each a tensor of its own, at its place in the file.
- Rotary pairs side by side in q and k (Meta's files, GLM, Cohere), where the model has the two halves of each head.
  `with_split_pairs` reorders them as they are read.

`rows_for_file` undoes both when a model is saved.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from llama_mini.checkpoint.families import has_interleaved_pairs, key_table
from llama_mini.checkpoint.keys import KeyTable, to_file_name, whole_name
from llama_mini.checkpoint.source import BLOCK_ROWS, Destination, QuantizedWeights, Rows, Source, StoredCodes
from llama_mini.errors import CheckpointMismatchError
from llama_mini.model.config import LlamaConfig


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Shaped)


def split_parts(
    tensors: Mapping[str, T], keys: KeyTable, config: LlamaConfig, cut: Callable[[T, str, int, int], T]
) -> dict[str, T]:
    """The tensors, in the same order, with the parts in place of each that holds several parameters.

    cut: (tensor, name of the part, its first row, its number of rows) -> the part.

    Raises CheckpointMismatchError, which names the tensor, if its parts do not add up to its rows.
    """
    known, split = _parts(keys), dict[str, T]()
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    sizes = {"q": q, "k": kv, "v": kv, "gate": config.hidden_dim, "up": config.hidden_dim}
    for name, tensor in tensors.items():
        parts, first = known.get(_pattern(name), []), 0
        if not parts:
            split[name] = tensor
        elif sum(sizes[part] for part in parts) != (n_rows := tensor.shape[0] if tensor.shape else 1):
            expected = " + ".join(f"{sizes[part]} of {part}" for part in parts)
            raise CheckpointMismatchError(f"{name} has {n_rows} rows, but the configuration asks for {expected}")
        for part in parts:
            split[f"{name}[{part}]"] = cut(tensor, f"{name}[{part}]", first, sizes[part])
            first += sizes[part]
    return split


def with_split_pairs(source: Source) -> Source:
    """The source of a file that has rotary pairs side by side, with the rows of q and k in the model's order.

    They are read a few heads at a time, in whole blocks of the packed formats.
    """
    turned = ("layers.{}.attention.q_proj", "layers.{}.attention.k_proj")
    ours_of = {name: source.keys.get(_pattern(name), "").rpartition(".")[0] for name in source.tensors}
    head_dim = source.config.head_dim
    heads = {  # of whole heads: `match` reports any other, and may read it before
        name for name, ours in ours_of.items() if ours in turned and sum(source.tensors[name].shape[:1]) % head_dim == 0
    }
    at_once = math.lcm(head_dim, BLOCK_ROWS)

    def in_order(
        chunks: Iterator[Rows[Any]], split: Callable[[Any], list[Tensor]], join: Callable[..., Any]
    ) -> Iterator[Rows[Any]]:
        """split, join: what holds some rows <-> tensors with a row for each of them."""
        waiting: list[list[Tensor]] = []
        for name, first, rows in chunks:
            if name not in heads:
                yield name, first, rows
                continue
            waiting.append(split(rows))
            end = first + len(waiting[-1][0])
            if end % at_once == 0 or end == source.tensors[name].shape[0]:
                begin = end - sum(len(values) for values, *_ in waiting)
                columns = map(torch.cat, zip(*waiting, strict=True))
                ordered = join(*(reorder_pairs(values, source.config, to_file=False) for values in columns))
                waiting.clear()
                yield name, begin, ordered
                del ordered  # before the next ones are read

    def read(names: Collection[str], dtype: torch.dtype, into: Destination, whole: bool) -> Iterator[Rows[Tensor]]:
        elsewhere: Destination = lambda name, *at: None if name in heads else into(name, *at)  # noqa: E731
        return in_order(source.read_rows(names, dtype, elsewhere, whole), lambda rows: [rows], lambda rows: rows)

    def read_quantized(names: Collection[str]) -> Iterator[Rows[StoredCodes]]:
        split = lambda rows: [values for values in rows.unpacked() if values is not None]  # noqa: E731

        def join(codes: Tensor, scale: Tensor, *rest: Tensor) -> QuantizedWeights:
            super_scales = rest[-1] if scale.dtype == torch.int8 else None
            least = rest[0] if len(rest) > (super_scales is not None) else None
            return QuantizedWeights(codes, scale, least, super_scales)

        return in_order(source.read_quantized(names), split, join)

    return replace(source, read_rows=read, read_quantized=read_quantized)


def rows_for_file(
    parameters: Iterable[tuple[str, Tensor]], model_type: str, config: LlamaConfig
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters -> the tensors of the family's file, with their names. Parts of one tensor wait for each other."""
    keys, waiting = key_table(model_type), dict[str, Tensor]()
    known = _parts(keys)
    heads = ("q_proj", "k_proj") if has_interleaved_pairs(model_type) else ()
    for ours, tensor in parameters:
        if ours.split(".")[-2] in heads:
            tensor = reorder_pairs(tensor, config, to_file=True)
        name = to_file_name(ours, keys)
        whole = whole_name(name)
        if whole == name:
            yield name, tensor
            continue
        waiting[name] = tensor
        parts = [f"{whole}[{part}]" for part in known[_pattern(whole)]]
        if waiting.keys() >= set(parts):
            yield whole, torch.cat([waiting.pop(part) for part in parts])


def reorder_pairs(rows: Tensor, config: LlamaConfig, to_file: bool) -> Tensor:
    """Whole heads of a q or k weight or bias: rotary pairs side by side -> the halves of each head, or back."""
    heads = rows.reshape(len(rows) // config.head_dim, config.head_dim, -1)
    turned, rest = heads.tensor_split([config.rotary_dim], dim=1)
    pairs = turned.unflatten(1, (2, -1) if to_file else (-1, 2))
    return torch.cat((pairs.transpose(1, 2).flatten(1, 2), rest), dim=1).reshape(rows.shape)


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{}.", name, count=1)


def _parts(keys: KeyTable) -> dict[str, list[str]]:
    """The name of each tensor that holds several parameters -> its parts, in the order of the rows."""
    parts: dict[str, list[str]] = {}
    for theirs in keys:
        if theirs.endswith("]"):
            parts.setdefault(whole_name(theirs), []).append(theirs[:-1].partition("[")[2])
    return parts
