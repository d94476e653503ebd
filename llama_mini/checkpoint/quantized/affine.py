"""Codes of up to eight bits, with a scale and a minimum for each group of columns: GPTQ, AWQ and MLX store these."""

from collections.abc import Callable, Collection, Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from llama_mini.checkpoint.code_formats import ROW, grouped
from llama_mini.checkpoint.io.safetensors_header import Tensors
from llama_mini.checkpoint.quantized.weight import Parts, QuantizedMatrix, fault, scales_of
from llama_mini.checkpoint.source import QuantizedWeights

GROUP = 32  # columns that share a scale in most of our own formats


class Affine(NamedTuple):
    """n rows of a matrix: value = scale · code + min. codes (n, columns) uint8; scale and min (n, groups) float32."""

    codes: Tensor
    scale: Tensor
    min: Tensor


def unpack(words: Tensor, bits: int, order: Sequence[int] = ()) -> Tensor:
    """Codes of `bits` bits from int32 words, the lowest bits first: (..., words) -> (..., codes) uint8.

    A code may lie in two words, as those of 3, 5 and 6 bits do. The bits of a row of words must be whole codes.
    order: where among eight codes the first, second, ... of them are, if not one after another.
    """
    n_bytes = bits if order else bits // gcd(bits, 8)  # that hold whole codes
    stored = words.contiguous().view(torch.uint8).unflatten(-1, (-1, n_bytes))
    places = order or range(8 * n_bytes // bits)
    codes = torch.empty(*stored.shape[:-1], len(places), dtype=torch.uint8, device="cpu")
    for at, i in enumerate(places):
        byte, shift = divmod(i * bits, 8)
        code = stored[..., byte] >> shift
        if shift + bits > 8:
            code |= stored[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., at])
    return codes.flatten(-2)


def unpack_some(words: Tensor, bits: int, first: int, n: int, order: Sequence[int] = ()) -> Tensor:
    """`n` codes of each row from code `first` on."""
    begin = first // 32
    codes = unpack(words[:, begin * bits : -(-(first + n) // 32) * bits], bits, order)
    return codes[:, first - 32 * begin :][:, :n]


def affine_matrix(
    module: str,
    shape: tuple[int, int],
    parts: Tensors,
    method: str,
    bits: int,
    group: int | Tensor,
    decode: Callable[[Parts, int, int], Affine],
    symmetric: bool = False,
    by_rows: Collection[str] = (),
) -> QuantizedMatrix:
    """A matrix that `decode` reads as codes, scales and minima.

    method: as people call it. group: columns that share a scale, or the group of each column, (columns,) int64.
    symmetric: the middle code, 2^(bits-1), stands for zero.

    Codes of up to six bits, and symmetric ones of eight, stay as they are if a group is of whole 32 columns, which are
    sorted by their groups where they are no neighbours. They have a scale for each 2^k columns, as large as the groups
    allow, or for each row.
    """
    columns = shape[1]
    group = min(group, columns) if isinstance(group, int) else group
    order = group.argsort(stable=True) if isinstance(group, Tensor) else None
    groups = _groups(group, columns) if order is None else _groups(group, columns)[order]
    share = lambda size: torch.equal(groups, groups[::size].repeat_interleave(size)[:columns])  # noqa: E731
    has_codes = columns % GROUP == 0 and share(GROUP) and (bits <= 6 or (bits == 8 and symmetric))
    size = GROUP
    while has_codes and size < columns and share(2 * size):
        size *= 2
    of_codes = groups[::size].clone()  # the group of the first of them: it outlives the other

    def floats(parts: Parts, first: int, n: int) -> Tensor:
        codes, scale, least = decode(parts, first, n)
        at = _groups(group, columns)
        return codes.float().mul_(scale.index_select(1, at)).add_(least.index_select(1, at))

    def as_codes(parts: Parts, first: int, n: int) -> QuantizedWeights:
        codes, scale, least = decode(parts, first, n)
        if bits == 8 and not torch.equal(least, -128 * scale):
            raise fault(scales_of(matrix.parts)[0], "is of a symmetric matrix, but its zero points are not all 128")
        codes = codes.contiguous() if order is None else codes[:, order]
        scale, least = (values.half()[:, of_codes] for values in (scale, least))
        return QuantizedWeights(codes, scale, None if bits == 8 else least)

    how = f"groups of {group}" if isinstance(group, int) else "columns grouped by g_idx"
    matrix = QuantizedMatrix(
        name=f"{module}.weight",
        shape=shape,
        parts=parts,
        number_format=f"{method} {bits} bits, {how}{', symmetric' if symmetric else ''}",
        kept=grouped(f"int{bits}", size if size < columns else ROW) if has_codes else "int8",
        floats=floats,
        codes=as_codes if has_codes else None,
        order=order if has_codes else None,
        by_rows=by_rows,
    )
    return matrix


def _groups(group: int | Tensor, columns: int) -> Tensor:
    """The group of each column, (columns,) int64."""
    return group if isinstance(group, Tensor) else torch.arange(columns) // group
