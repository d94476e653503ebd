"""bitsandbytes: int8 with a scale for each row (`SCB`), NF4 and FP4 with one for each block of a flattened matrix.

The sixteen values of NF4 and FP4 are in `quant_map`, the largest magnitude of each block in `absmax`. Where statistics
are nested, `absmax` holds codes of `nested_quant_map`, in blocks of their own, less `nested_offset`. Shape and sizes
are JSON in the bytes of `quant_state.bitsandbytes__nf4`. The tensors tell which matrices are quantised, and how.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama_mini.checkpoint.code_formats import FORMATS
from llama_mini.checkpoint.io.files import decode_json
from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, SafetensorsTensor, Tensors
from llama_mini.checkpoint.quantized.affine import GROUP, Affine, affine_matrix
from llama_mini.checkpoint.quantized.weight import (
    Parts,
    QuantizedMatrix,
    expect,
    fault,
    modules,
    read_part,
    sizes_of,
    warn_of_activations,
    warn_of_unknown,
)
from llama_mini.checkpoint.source import QuantizedWeights
from llama_mini.validate import is_finite, is_whole, join_names, short_repr

_STATES = {kind: f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_KEYS = ("quant_method", "load_in_", "_load_in_", "bnb_4bit_", "llm_int8_")
_LARGEST_STATE = 4096  # bytes


def matrices(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of bitsandbytes. Raises CheckpointFormatError."""
    warn_of_unknown(settings, _KEYS)
    eight_bits = [*modules(tensors, ("weight", "SCB"), ("weight_format",))]
    if eight_bits:
        warn_of_activations("bitsandbytes in 8 bits")
    yield from (_int8_matrix(*module) for module in eight_bits)
    for module, parts in modules(
        tensors, ("weight", "weight.absmax", "weight.quant_map"), (*_NESTED, *_STATES.values())
    ):
        yield _four_bit_matrix(module, parts)


def _int8_matrix(module: str, parts: Tensors) -> QuantizedMatrix:
    weight = parts["weight"]
    rows, columns = sizes_of(weight)
    expect(weight, ["I8"], (rows, columns))
    expect(parts["SCB"], WEIGHTS, (rows,))
    if (layout := parts.get("weight_format")) is not None and read_part(layout).any():
        raise fault(layout, "is not 0, rows one after another; save the checkpoint with a newer bitsandbytes")

    def decode(values: Parts, first: int, n: int) -> Affine:
        scale = values["SCB"].float()[:, None] / 127
        return Affine(values["weight"].view(torch.uint8) + 128, scale, -128 * scale)

    by_rows = ("weight", "SCB")
    matrix = affine_matrix(module, (rows, columns), parts, "bitsandbytes", 8, columns, decode, True, by_rows)
    return replace(matrix, number_format="bitsandbytes int8, a scale for each row")


def _four_bit_matrix(module: str, parts: Tensors) -> QuantizedMatrix:
    weight, absmax = parts["weight"], parts["weight.absmax"]
    kind = next((kind for kind, part in _STATES.items() if part in parts), None)
    if kind is None:
        raise fault(
            weight, f"needs {' or '.join(f'{module}.{part}' for part in _STATES.values())}, which no file holds"
        )
    rows, columns, block, nested_block, offset = _read_state(parts[_STATES[kind]], kind)
    n_blocks = -(-rows * columns // block)
    # Of whatever dtype (bnb_4bit_quant_storage), these are bytes.
    stored = weight._replace(dtype="U8", shape=(weight.end - weight.begin,))
    expect(stored, ["U8"], (-(-rows * columns // 2),))
    expect(parts["weight.quant_map"], ["F32"], (16,))
    expect(absmax, ["F32" if nested_block is None else "U8"], (n_blocks,))
    if nested_block is not None:
        if missing := [f"{module}.{part}" for part in _NESTED if part not in parts]:
            raise fault(absmax, f"needs {join_names(missing)}, which no file holds")
        expect(parts[_NESTED[0]], ["F32"], (-(-n_blocks // nested_block),))
        expect(parts[_NESTED[1]], ["F32"], (256,))

    def largest(values: Parts, first: int, stop: int) -> Tensor:
        """The largest magnitude of each of these blocks."""
        found = values["weight.absmax"][first:stop]
        if nested_block is None:
            return found
        scales = values[_NESTED[0]][torch.arange(first, stop) // nested_block]
        return values[_NESTED[1]][found.int()] * scales + offset

    def indices(values: Parts, first: int, n: int) -> Tensor:
        """Where in the table the numbers of n rows are, in one line: blocks go on from row to row."""
        start, stop = first * columns, (first + n) * columns
        packed = values["weight"][start // 2 : -(-stop // 2)]
        return torch.stack((packed >> 4, packed & 15), -1).flatten()[start % 2 :][: stop - start].int()

    def spread(values: Parts, first: int, n: int, per: int) -> Tensor:
        """The largest magnitude of the block of each `per` numbers of n rows, in one line."""
        start, stop = first * columns, (first + n) * columns
        blocks = largest(values, start // block, -(-stop // block)).repeat_interleave(block // per)
        return blocks[start % block // per :][: (stop - start) // per]

    def floats(values: Parts, first: int, n: int) -> Tensor:
        numbers = values["weight.quant_map"][indices(values, first, n)] * spread(values, first, n, 1)
        return numbers.view(n, columns)

    def codes(values: Parts, first: int, n: int) -> QuantizedWeights:
        scale = (spread(values, first, n, GROUP) / steps).half()
        found = indices(values, first, n).view(n, columns).to(torch.uint8)
        if kind == "fp4":  # 1/192 is 5/8 of the table's 1/120: in every row it becomes 0 in three of eight columns
            places = torch.arange(first, first + n)[:, None] * 3 + torch.arange(columns) * 5
            found[(places % 8 > 4) & (found & 7 == 1)] = 0
        return QuantizedWeights(found, scale.view(n, -1), None)

    table = FORMATS[kind].table or ()
    steps = max(table)
    is_known = (read_part(parts["weight.quant_map"]) * steps).round().tolist() == list(table)
    has_codes = is_known and columns % GROUP == 0 and block % GROUP == 0
    return QuantizedMatrix(
        name=f"{module}.weight",
        shape=(rows, columns),
        parts={**parts, "weight": stored},
        number_format=f"bitsandbytes {kind.upper()}, blocks of {block}{'' if nested_block is None else ', nested'}",
        kept=kind if has_codes else "int8",
        floats=floats,
        codes=codes if has_codes else None,
    )


def _read_state(part: SafetensorsTensor, kind: str) -> tuple[int, int, int, int | None, float]:
    """Rows, columns, the size of a block, that of a block of nested statistics (None: not nested), and their offset.

    Raises CheckpointFormatError unless the part is JSON whose values can be true.
    """
    n_bytes = part.end - part.begin
    if n_bytes > _LARGEST_STATE:
        raise fault(part, f"has {n_bytes} bytes, not JSON of up to {_LARGEST_STATE}")
    expect(part, ["U8"], (n_bytes,))
    try:
        state = decode_json(bytes(read_part(part).tolist()).decode(errors="replace"))
    except ValueError as error:
        raise fault(part, str(error)) from None
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise fault(part, f"must be a JSON object whose quant_type is {kind}, not {short_repr(state)}")
    shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
    block, *nested = (state.get(key) for key in ("blocksize", "nested_blocksize") if key == "blocksize" or key in state)
    if not isinstance(shape, list) or len(shape) != 2:
        raise fault(part, f"must hold a shape of two numbers, not {short_repr(shape)}")
    for size in (*shape, block, *nested):
        if not is_whole(size) or not 0 < size < 1 << 31:
            raise fault(part, f"holds {short_repr(size)} where a size must be")
    if not is_finite(offset):
        raise fault(part, f"must hold a finite nested_offset, not {short_repr(offset)}")
    return *shape, block, nested[0] if nested else None, offset
