"""The operators in float64, written from the formulas: the native ones are compared with these.

Each rounds to the model's dtype where the native operator does, so that early and late casts differ. A prompt is more
than one token of a row; `isa` is the ISA variant that the native operators use.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from llama_mini.checkpoint import code_formats
from llama_mini.checkpoint.source import QuantizedWeights
from llama_mini.optimize.build import load_kernels
from llama_mini.optimize.mixed_linear import MixedLinear
from llama_mini.optimize.packed_linear import FloatLinear, PackedLinear
from llama_mini.optimize.quantized_linear import QuantizedLinear

Test = TypeVar("Test", bound=Callable[..., Any])
SAME = ("mxfp4", "fp4")  # to the operators, iq4 with other tables
CODED = [name for name in code_formats.FORMATS if name not in SAME]
CODED += ["int4g64", "int8row"]  # two of those whose groups are larger than a kernel reads
FORMATS = ["float", *CODED]


def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """For a fixture whose parameters are ISA variants: uses one, and then the best one again."""
    assert load_kernels()
    known = torch.ops.llama_mini.isa_variants()
    if request.param not in known:
        pytest.skip(f"this processor has no {request.param}")
    torch.ops.llama_mini.use_isa(request.param)
    yield request.param
    torch.ops.llama_mini.use_isa(known[0])


def examples(n: int) -> Callable[[Test], Test]:
    """So many examples of a property."""
    return settings(max_examples=n, deadline=None, database=None)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(shape: Sequence[int], dtype: torch.dtype, rng: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(dtype)


def some(n: int, rng: torch.Generator) -> list[int]:
    """Three of n rows at random, or fewer: what holds for each of them is checked of these."""
    return torch.randperm(n, generator=rng)[:3].tolist()


def random_gain(width: int, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    return (torch.rand(width, generator=rng) + 0.5).to(dtype)


def linear_of(format_: str) -> Callable[..., PackedLinear]:
    """Makes an empty matrix in a format."""
    return FloatLinear if format_ == "float" else partial(QuantizedLinear, format_)


def random_matrix(
    format_: str, parts: Sequence[int], columns: int, dtype: torch.dtype, rng: torch.Generator, bias: bool = False
) -> PackedLinear:
    """A matrix in a format; `mixed`: in one at random, or of q, k and v in several. Some codes are unused."""
    if format_ == "mixed" and len(parts) == 3 and torch.rand((), generator=rng) < 0.5:
        cuts = [[0, 1, 3], [0, 2, 3], [0, 1, 2, 3]][int(torch.randint(3, (), generator=rng))]
        kinds = [CODED[int(torch.randint(len(CODED), (), generator=rng))] for _ in cuts[1:]]
        runs = zip(kinds, pairwise(cuts), strict=True)
        return MixedLinear([random_matrix(kind, parts[a:b], columns, dtype, rng, bias) for kind, (a, b) in runs])
    format_ = FORMATS[int(torch.randint(len(FORMATS), (), generator=rng))] if format_ == "mixed" else format_
    matrix = linear_of(format_)(list(parts), columns, dtype, True, bias)
    for i, rows in enumerate(parts):
        if isinstance(matrix, QuantizedLinear):
            matrix.load_codes(i, random_codes(format_, rows, -(-columns // 32) * 32, rng))
        else:
            matrix.load(i, random((rows, columns), dtype, rng, columns**-0.5))
        if bias:
            matrix.bias_destination(i).copy_(random((rows,), dtype, rng))
    return matrix


def apart(matrix: PackedLinear) -> int:
    """Which of q, k and v begin another matrix, as the operators want it: 1 for k, and 2 more for v."""
    begins = [*accumulate(len(each.parts) for each in matrix.matrices)]
    return (1 in begins) + 2 * (2 in begins)


def random_codes(format_: str, rows: int, columns: int, rng: torch.Generator) -> QuantizedWeights:
    """Rows whose products with unit normal numbers are of the order of one."""
    kind = code_formats.code_format(format_)
    most = 2**kind.bits if kind.table is None else max(map(abs, kind.table))
    codes = torch.randint(2**kind.bits, (rows, columns), generator=rng, dtype=torch.uint8)
    shape = rows, -(-columns // kind.group)
    if kind.super_blocks:
        scale, least = (torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8) for _ in range(2))
        factors = random((rows, -(-columns // 256), 1 + kind.has_min), torch.float16, rng, columns**-0.5 / 64)
        factors[..., 0] /= most
        return QuantizedWeights(codes, scale, least if kind.has_min else None, factors.flatten(1))
    scale, least = (random(shape, torch.float16, rng, columns**-0.5) for _ in range(2))
    return QuantizedWeights(codes, scale / most, least if kind.has_min else None)


def dense(matrix: PackedLinear) -> Tensor:
    """The dequantized matrix, (rows, columns) float64, from the layout that codes.h describes."""
    if not isinstance(matrix, QuantizedLinear):
        return matrix.tensors[0].double()
    kind, blocks = matrix.format, matrix.rows // 16
    vectors = matrix.qweight.int()  # (block, group of 32, vector, row, column of 4)
    codes, at, shift = torch.zeros(blocks, vectors.shape[1], 8, 16, 4, dtype=torch.int), 0, 0
    for width in (8, 4, 2, 1):
        if kind.bits & width:
            for quad in range(8):
                bits = vectors[:, :, at + quad * width // 8] >> quad * width % 8 & (1 << width) - 1
                codes[:, :, quad] |= bits << shift
            at, shift = at + width, shift + width
    codes = codes.permute(0, 3, 1, 2, 4).reshape(matrix.rows, -1)
    if kind.table is not None:
        values = torch.tensor(kind.table, dtype=torch.float64)[codes]
    else:
        values = codes.double() - (0 if kind.has_min else 2 ** (kind.bits - 1))
    group = torch.arange(codes.shape[1]) // kind.group
    scales, mins = (
        None if t is None else t.transpose(1, 2).reshape(matrix.rows, -1)[:, group].double()
        for t in (matrix.scales, matrix.mins)
    )
    if matrix.super_scales is not None:
        factors = matrix.super_scales.permute(0, 3, 1, 2).reshape(matrix.rows, -1, 1 + kind.has_min)
        factors = factors[:, torch.arange(codes.shape[1]) // 256].double()
        scales, mins = scales * factors[..., 0], None if mins is None else mins * factors[..., 1]
    values = values * scales
    if mins is not None:
        values = values + mins
    return values[:, : matrix.columns]


def product(x: Tensor, matrix: PackedLinear) -> Tensor:
    return _with_bias(x.double() @ dense(matrix)[: matrix.width].T, matrix)


def product_of_many(x: Tensor, matrix: PackedLinear, isa: str) -> Tensor:
    if isinstance(matrix, MixedLinear):
        return torch.cat([product_of_many(x, each, isa) for each in matrix.matrices], -1)
    tokens, weight = multiplied(x, matrix, isa)
    return _with_bias(tokens @ weight.T, matrix)


def _with_bias(y: Tensor, matrix: PackedLinear) -> Tensor:
    return y if matrix.bias is None else y + matrix.bias.double()


def multiplied(x: Tensor, matrix: PackedLinear, isa: str) -> tuple[Tensor, Tensor]:
    """What gemm multiplies, in float64: the tokens, quantized or not, and the weights."""
    weight = dense(matrix)[: matrix.width]
    if matrix.name == "float":
        return x.double(), weight
    if isa == "amx" and x.dtype == torch.bfloat16:
        return x.double(), weight.float().bfloat16().double()
    return quantized(x, matrix, isa, x.dtype), weight


def product_of_few(x: Tensor, matrix: PackedLinear, isa: str, dtype: torch.dtype) -> Tensor:
    """As gemv multiplies, in a model of `dtype`."""
    if isinstance(matrix, MixedLinear):
        return torch.cat([product_of_few(x, each, isa, dtype) for each in matrix.matrices], -1)
    return product(x if matrix.name == "float" else quantized(x, matrix, isa, dtype), matrix)


def quantized(x: Tensor, matrix: PackedLinear, isa: str, dtype: torch.dtype) -> Tensor:
    """Tokens (..., columns) for a quantized matrix: eight bits for 32 columns, sixteen if they hold an outlier."""
    codes = code_formats.code_format(matrix.name)
    columns = x.shape[-1]
    steps = torch.nn.functional.pad(x.float(), (0, -columns % 32)).unflatten(-1, (-1, 32))
    peak = steps.abs().amax(-1, keepdim=True)
    outlier = peak.square() > 3 * peak.square().mean(-2, keepdim=True)
    if dtype == torch.float32 or (isa == "avx2" and (codes.bits == 8 or codes.table)):
        outlier = torch.ones_like(outlier)
    levels = torch.where(outlier, 32512.0, 127.0)
    codes = torch.where(peak == 0, 0, steps.double() * (levels / peak).double()).round()
    return (codes * peak.double() / levels.double()).flatten(-2)[..., :columns]
