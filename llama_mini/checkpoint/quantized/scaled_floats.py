"""FP8 and FP4 numbers with a scale for each block of a matrix: compressed-tensors, DeepSeek, FBGEMM and ModelOpt."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from llama_mini.checkpoint.code_formats import FORMATS
from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, SafetensorsTensor, Tensors
from llama_mini.checkpoint.quantized.affine import GROUP
from llama_mini.checkpoint.quantized.weight import Parts, QuantizedMatrix, expect, fault, sizes_of
from llama_mini.checkpoint.source import QuantizedWeights
from llama_mini.errors import ConfigError
from llama_mini.validate import check_whole, short_repr

Shape = tuple[int, int]
FP8, FP4 = ("F8_E4M3", "F8_E5M2"), ("U8",)  # dtypes of the numbers; a byte holds two of FP4
OF_ACTIVATIONS = (  # not used
    *("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale", "output_scale"),
)
_SCALES = (*WEIGHTS, *FP8, "U8", "F8_E8M0")  # of the last two, powers of two, stored as the exponent plus 127


def float_matrix(
    module: str,
    parts: Tensors,
    method: str,
    dtypes: Collection[str] = FP8,
    block: Shape | None = None,
    weight: str = "weight",
    scale: str = "weight_scale",
    adjust: Callable[[Tensor, Parts], Tensor] | None = None,
) -> QuantizedMatrix:
    """A matrix whose value is number · scale of its block.

    method: as people call it. dtypes: of the numbers, FP8 or FP4. block: the rows and columns that share a scale; None:
    all of them, or those of a row, as the shape of the scales says. weight, scale: the parts that hold these.
    adjust: (scales, parts) -> scales, where there is a second scale, of the whole matrix.

    Where the blocks are of whole groups, FP4 keeps its codes; those of int8 for FP8 are chosen so that most numbers are
    exact.

    Raises CheckpointFormatError.
    """
    stored, is_fp4 = parts[weight], dtypes == FP4
    expect(stored, dtypes, sizes_of(stored))
    rows, columns = shape = stored.shape[0], stored.shape[1] * (2 if is_fp4 else 1)
    block = block or ((1, columns) if parts[scale].shape[:1] == (rows,) else shape)
    parts = {**parts, scale: expect_grid(parts[scale], shape, block)}

    def read(parts: Parts, first: int, n: int, per: int) -> tuple[Tensor, Tensor]:
        """n rows and the scale of each `per` columns. FP4 as codes, for which the formats have the numbers doubled."""
        scales = spread(parts[scale], shape, block, first, n, per)
        scales = scales if adjust is None else adjust(scales, parts)
        return (_codes_of_fp4(parts[weight]), scales / 2) if is_fp4 else (parts[weight].float(), scales)

    def floats(parts: Parts, first: int, n: int) -> Tensor:
        numbers, scales = read(parts, first, n, 1)
        return (torch.tensor(FORMATS["mxfp4"].table)[numbers.int()] if is_fp4 else numbers) * scales

    def codes(parts: Parts, first: int, n: int) -> QuantizedWeights:
        numbers, scales = read(parts, first, n, FORMATS[kept].group)
        if not is_fp4:
            return _fp8_codes(numbers, scales)
        half = scales.half()
        if kept == "mxfp4":  # which is kept without rounding, so a scale that would become 0 is an error, as in GGUF
            lost = (numbers & 7 != 0).unflatten(1, (-1, GROUP)).any(-1) & (half == 0)
            half = torch.where(lost, torch.inf, half)
        return QuantizedWeights(numbers, half, None)

    formats = ("mxfp4", "nvfp4") if is_fp4 else ("int8",)  # the one with the larger groups first
    widths = {name: FORMATS[name].group for name in formats if columns % GROUP == 0}
    fitting = [name for name, width in widths.items() if block[1] % width == 0 or block[1] >= columns]
    kept = fitting[0] if fitting else "int8"
    return QuantizedMatrix(
        name=f"{module}.weight",
        shape=shape,
        parts=parts,
        number_format=f"{method}, {describe(shape, block)}",
        kept=kept,
        floats=floats,
        codes=codes if fitting else None,
        by_rows=(weight,),
    )


def check_block(name: str, sizes: Any) -> Shape:
    """A setting as the rows and columns that share a scale. Raises ConfigError."""
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise ConfigError(f"{name} must be [rows, columns], not {short_repr(sizes)}")
    for size in sizes:
        check_whole(name, size, ConfigError)
    return sizes[0], sizes[1]


def expect_grid(
    part: SafetensorsTensor, shape: Shape, block: Shape, dtypes: Collection[str] = _SCALES
) -> SafetensorsTensor:
    """The part, with the dtype of its powers of two if it is U8; dimensions of one may be left out.

    Raises CheckpointFormatError unless it has a number for each block.
    """
    grid = _grid(shape, block)
    if part.dtype not in dtypes or [n for n in part.shape if n != 1] != [n for n in grid if n != 1]:
        what = f"is {part.dtype} of shape {short_repr(part.shape)}"
        raise fault(
            part, f"{what}, not {' or '.join(dtypes)} for {grid[0]} x {grid[1]} blocks of {block[0]} x {block[1]}"
        )
    return part._replace(dtype="F8_E8M0") if part.dtype == "U8" else part


def spread(scales: Tensor, shape: Shape, block: Shape, first: int, n: int, per: int = 1) -> Tensor:
    """The scale of each `per` columns of n rows of a matrix from row `first` on: (n, columns / per) float32."""
    begin = first // block[0]
    grid = scales.reshape(_grid(shape, block))[begin : (first + n - 1) // block[0] + 1]
    is_power = scales.dtype == torch.float8_e8m0fnu
    values = torch.exp2(grid.view(torch.uint8).float() - 127) if is_power else grid.float()
    rows = values[torch.arange(first, first + n) // block[0] - begin]
    return rows.repeat_interleave(max(min(block[1], shape[1]) // per, 1), 1)[:, : -(-shape[1] // per)]


def describe(shape: Shape, block: Shape) -> str:
    """Which elements share a scale."""
    if block == shape:
        return "one scale"
    if block[0] > 1:
        return f"blocks of {block[0]} x {block[1]}"
    return "a scale for each row" if block[1] == shape[1] else f"groups of {block[1]}"


def _grid(shape: Shape, block: Shape) -> Shape:
    """How many blocks a matrix has, down and across; the last ones may be cut."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _codes_of_fp4(packed: Tensor) -> Tensor:
    """Two codes a byte, the first in the low bits: (rows, bytes) uint8 -> (rows, 2 · bytes)."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def _fp8_codes(numbers: Tensor, scales: Tensor) -> QuantizedWeights:
    """FP8 numbers, with a scale for each 32 columns, as codes of int8.

    A step is 1/64 of the power of two that the group's largest number has, an eighth of its last bit: so numbers down
    to an eighth of that power are exact, and none has a code beyond 120.
    """
    groups = numbers.unflatten(1, (-1, GROUP))
    step = torch.exp2(torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent - 7.0)
    codes = (groups / step).round_().add_(128)
    return QuantizedWeights(codes.flatten(1).to(torch.uint8), (step[..., 0] * scales).half(), None)
