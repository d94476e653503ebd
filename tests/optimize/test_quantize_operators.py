"""Quantizing floats, packing codes, repacking GGUF blocks: in every ISA variant the bits of PyTorch's operators."""

from itertools import product

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_mini.checkpoint.code_formats import code_format
from llama_mini.checkpoint.gguf.blocks import Blocks
from llama_mini.optimize.build import ISA_VARIANTS
from llama_mini.optimize.quantized_linear import QuantizedLinear
from tests.optimize.twins import CODED, dense, each_isa, examples, generator, random_codes, random_matrix, same_bits

QUANTIZED = ["int8", "int4", "int2"]  # floats become any format of 32 columns with a minimum, and int8
Q4_1 = gguf.GGMLQuantizationType.Q4_1
seeds = st.integers(0, 2**32)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
op = torch.ops.llama_mini


isa = pytest.fixture(scope="module", params=ISA_VARIANTS)(each_isa)


@pytest.mark.parametrize("format_", QUANTIZED)
@given(seed=seeds, dtype=dtypes, first=st.integers(0, 2), rows=st.integers(1, 40), columns=st.integers(1, 170))
@examples(30)
def test_quantize_gives_the_bits_of_its_twin(
    isa: str, format_: str, seed: int, dtype: torch.dtype, first: int, rows: int, columns: int
) -> None:
    """For large, small and equal numbers, and for halves, which are rounded to even."""
    rng = generator(seed)
    weight = torch.randn(rows, columns, generator=rng) * 10.0 ** torch.randint(-9, 4, (rows, 1), generator=rng)
    weight[rng.initial_seed() % 3 :: 3] = torch.randint(-254, 255, (columns,), generator=rng) / 2
    weight[:, columns // 2 :] *= torch.randint(2, (rows, 1), generator=rng)
    weight += 0.0  # no -0: either of -0 and 0 may be the minimum
    found, twin = (random_matrix(format_, [70, 90], columns, dtype, generator(0)) for _ in range(2))
    twin.kernels = False
    for matrix in (found, twin):
        matrix.load(1, weight.to(dtype), 16 * first)
    assert all(map(same_bits, found.tensors, twin.tensors))


@pytest.mark.parametrize("number_format", ["Q4_0", "Q4_1", "Q8_0"])
@given(seed=seeds, first=st.integers(0, 2), rows=st.integers(1, 40), steps=st.integers(1, 5))
@examples(30)
def test_repack_gives_the_bits_of_its_twin(
    isa: str, number_format: str, seed: int, first: int, rows: int, steps: int
) -> None:
    rng = generator(seed)
    kind = gguf.GGMLQuantizationType[number_format]
    numbers = torch.randn(rows, 32 * steps, generator=rng) * 10.0 ** torch.randint(-3, 3, (rows, 1), generator=rng)
    blocks = Blocks(torch.from_numpy(gguf.quants.quantize(numbers.numpy(), kind)), number_format)
    format_ = "int8" if number_format == "Q8_0" else "int4"
    found, twin = (random_matrix(format_, [70, 90], 32 * steps, torch.bfloat16, generator(0)) for _ in range(2))
    twin.kernels = False
    for matrix in (found, twin):
        assert isinstance(matrix, QuantizedLinear)
        matrix.load_codes(1, blocks, 16 * first)
    assert all(map(same_bits, found.tensors, twin.tensors))


@pytest.mark.parametrize("format_", CODED)
@given(seed=seeds, first=st.integers(0, 2), rows=st.integers(1, 40), groups=st.integers(1, 36))
@examples(10)
def test_codes_are_packed_as_they_are(isa: str, format_: str, seed: int, first: int, rows: int, groups: int) -> None:
    """To the bits of its twin; and as what the codes mean, in NumPy. Groups of 16 may be odd in number, others cut."""
    rng, kind = generator(seed), code_format(format_)
    columns = min(kind.group, 32) * groups
    found, twin = (random_matrix(format_, [70, 90], columns, torch.float32, generator(0)) for _ in range(2))
    twin.kernels = False
    weights = random_codes(format_, rows, columns, rng)
    for matrix in (found, twin):
        assert isinstance(matrix, QuantizedLinear)
        matrix.load_codes(1, weights, 16 * first)
    assert all(map(same_bits, found.tensors, twin.tensors))
    codes, scale, least, super_scales = (None if t is None else t.numpy().astype(np.float64) for t in weights)
    if super_scales is not None:
        factors = super_scales.reshape(rows, -1, 1 + kind.has_min)[:, np.arange(scale.shape[1]) * kind.group // 256]
        scale, least = scale * factors[..., 0], None if least is None else least * factors[..., 1]
    whole = codes if kind.has_min else codes - 2 ** (kind.bits - 1)
    group = np.arange(columns) // kind.group
    values = (whole if kind.table is None else np.array(kind.table)[codes.astype(int)]) * scale[:, group]
    if least is not None:
        values = values + least[:, group]
    assert np.array_equal(dense(found)[80 + 16 * first :][:rows], values)
    at = torch.arange(80 + 16 * first, 80 + 16 * first + rows)
    for matrix in (found, twin):
        assert np.allclose(matrix.lookup(at), values, rtol=0, atol=1e-6)


def test_codes_of_four_bits_are_codes_of_five(isa: str) -> None:
    four, five = (random_matrix(format_, [20], 64, torch.float32, generator(0)) for format_ in ("int4", "int5"))
    weights = random_codes("int4", 20, 64, generator(1))
    stored = Blocks(torch.from_numpy(gguf.quants.quantize(np.eye(20, 64, dtype=np.float32), Q4_1)), "Q4_1")
    for rows in (weights, stored):
        for matrix in (four, five):
            matrix.load_codes(0, rows)
        assert torch.equal(dense(four), dense(five))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e8, -1e8])
@pytest.mark.parametrize("format_", QUANTIZED)
def test_what_no_scale_holds_is_seen_wherever_it_stands(isa: str, format_: str, bad: float) -> None:
    for column in range(40):
        matrix, weight = random_matrix(format_, [20], 40, torch.float32, generator(0)), torch.zeros(20, 40)
        assert op.quantize(weight, matrix.tensors, 0)
        weight[column % 20, column] = bad
        assert not op.quantize(weight, matrix.tensors, 0)


@pytest.mark.parametrize("format_", CODED)
def test_a_scale_or_minimum_of_codes_that_is_not_finite_is_seen(isa: str, format_: str) -> None:
    matrix = random_matrix(format_, [20], 64, torch.float32, generator(0))
    codes = [tensor for tensor in random_codes(format_, 20, 64, generator(1)) if tensor is not None]
    assert op.pack(codes, matrix.tensors, 0)
    halves = [i for i, tensor in enumerate(codes) if tensor.dtype == torch.float16]
    for spoiled, bad in product(halves, (0x7C00, 0xFC00, 0x7E01)):
        for column in range(codes[spoiled].shape[1]):
            wrong = [tensor.clone() for tensor in codes]
            wrong[spoiled].view(torch.uint16)[17, column] = bad
            assert not op.pack(wrong, matrix.tensors, 0), (spoiled, column, bad)


@pytest.mark.parametrize(("number_format", "at"), [("Q8_0", 0), ("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 2)])
@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E01])
def test_a_block_whose_scale_is_not_finite_is_seen(isa: str, number_format: str, at: int, bad: int) -> None:
    n_bytes = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[number_format]
    matrix = random_matrix("int8" if number_format == "Q8_0" else "int4", [20], 64, torch.float32, generator(0))
    blocks = torch.zeros(20, 2 * n_bytes, dtype=torch.uint8)
    assert op.repack(blocks, matrix.tensors, 64, 0)
    blocks[17, n_bytes + at], blocks[17, n_bytes + at + 1] = bad & 255, bad >> 8
    assert not op.repack(blocks, matrix.tensors, 64, 0)
