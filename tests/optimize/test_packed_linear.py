"""Weight formats by themselves, against NumPy in float64, in every shape."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_mini.errors import CheckpointFormatError
from llama_mini.optimize.packed_linear import PackedLinear, supported
from llama_mini.optimize.quantized_linear import QuantizedLinear
from tests.optimize.twins import examples, linear_of

KINDS = ["float", "int8", "int5", "int4"]
shapes = st.tuples(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 130))


def random_matrix(
    kind: str,
    parts: list[int],
    columns: int,
    dtype: torch.dtype = torch.float32,
    kernels: bool = True,
    bias: bool = False,
) -> tuple[PackedLinear, list[Tensor], list[Tensor]]:
    """A matrix, the parts it was made of, and their biases."""
    rng = np.random.default_rng([columns, *parts])
    weights = [torch.from_numpy(rng.standard_normal((rows, columns))).to(dtype) for rows in parts]
    biases = [torch.from_numpy(rng.standard_normal(rows)).to(dtype) for rows in parts] if bias else []
    matrix = linear_of(kind)(parts, columns, dtype, kernels, bias)
    for part, weight in enumerate(weights):
        matrix.load(part, weight)
    for part, numbers in enumerate(biases):
        matrix.bias_destination(part).copy_(numbers)
    return matrix, weights, biases


def floats(matrix: PackedLinear, part: int) -> Tensor:
    begin = matrix.offsets[part]
    return matrix.lookup(torch.arange(begin, begin + matrix.parts[part]))


@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes)
@examples(25)
def test_rows_are_near_what_was_put_in_by_half_a_step_of_their_scale(kind: str, shape: tuple[list[int], int]) -> None:
    parts, columns = shape
    matrix, weights, _ = random_matrix(kind, parts, columns)
    for part, weight in enumerate(weights):
        found = floats(matrix, part)
        assert found.shape == weight.shape
        if kind == "float":
            assert torch.equal(found, weight)
            continue
        for first in range(0, columns, 32):
            group, back = (t[:, first : first + 32].double() for t in (weight, found))
            edge = group if group.shape[1] == 32 or kind == "int8" else torch.nn.functional.pad(group, (0, 1))
            span = group.abs().amax(-1) if kind == "int8" else edge.amax(-1) - edge.amin(-1)
            step = span / {"int8": 127, "int5": 31, "int4": 15}[kind]
            rounding = (
                group.abs().amax(-1) * 2**-10 + span * (kind != "int8") * 2**-10
            )  # of scale and least to float16,
            smallest = 127 * 2**-25  # whose numbers below 6e-5 are 2^-24 apart, times the largest code
            assert ((back - group).abs().amax(-1) <= step / 2 + rounding + smallest).all()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_found_in_any_order_by_numbers_that_lie_apart(kind: str, kernels: bool) -> None:
    matrix, _, _ = random_matrix(kind, [70], 40, kernels=kernels)
    rows = torch.tensor([69, 1, 0, 2, 16, 3, 16, 4, 3, 5])[::2]
    assert torch.equal(matrix.lookup(rows), floats(matrix, 0)[rows])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(shape=shapes, n=st.integers(1, 40))
@examples(12)
def test_products_are_those_of_its_rows_for_few_and_many(
    kind: str, kernels: bool, bias: bool, shape: tuple[list[int], int], n: int
) -> None:
    parts, columns = shape
    matrix, _, biases = random_matrix(kind, parts, columns, kernels=kernels, bias=bias)
    x = torch.from_numpy(np.random.default_rng(n).standard_normal((1, n, columns))).float()
    y = matrix(x)
    assert y.shape == (1, n, matrix.width)
    for part, found in enumerate(matrix.split(y)):
        expected = x.double() @ floats(matrix, part).double().T
        if bias:
            expected += biases[part].double()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 if kernels else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rounds_its_output_once(kind: str) -> None:
    matrix, _, _ = random_matrix(kind, [40, 24], 96, torch.bfloat16)
    for shape in ((96,), (1, 96), (40, 1, 96), (17, 96)):
        x = torch.from_numpy(np.random.default_rng(shape[0]).standard_normal(shape)).bfloat16()
        y = matrix(x)
        assert y.dtype == torch.bfloat16
        for part, found in enumerate(matrix.split(y)):
            expected = x.double() @ floats(matrix, part).double().T
            isa, prompt = torch.ops.llama_mini.isa_variants()[0], shape == (17, 96)
            eight_bits = kind not in ("float", "int8" if isa == "avx2" else "") and not (prompt and isa == "amx")
            assert (found.double() - expected).norm() < (7e-3 if eight_bits else 4e-3) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_a_token_do_not_depend_on_how_many_there_are(kind: str, dtype: torch.dtype) -> None:
    matrix, _, _ = random_matrix(kind, [40, 24], 96, dtype)
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((40, 96))).to(dtype)
    decoded, prompt = matrix(x[:, None])[:, 0], matrix(x)
    assert torch.equal(torch.stack([matrix(row) for row in x]), decoded)
    for n in (2, 3, 5, 7, 16, 17, 33):
        assert torch.equal(matrix(x[:n, None])[:, 0], decoded[:n])
        assert torch.equal(matrix(x[-n:]), prompt[-n:])
        assert torch.equal(matrix(x[None, :n])[0], prompt[:n])


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_large_quantized_matrix_is_dequantized_in_pieces(
    kind: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, _, biases = random_matrix(kind, [300, 290], 33, kernels=kernels, bias=True)
    asked: list[int] = []
    lookup = matrix.lookup

    def counted(rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return lookup(rows)

    monkeypatch.setattr("llama_mini.optimize.quantized_linear._DEQUANTIZE_ROWS", 256)
    monkeypatch.setattr(matrix, "lookup", counted)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 33))).float()
    y = matrix.forward_torch(x)
    assert asked == [256, 256, matrix.width - 512]
    expected = torch.cat([x @ floats(matrix, part).T + biases[part] for part in range(2)], 1)
    torch.testing.assert_close(torch.cat(matrix.split(y), 1), expected, rtol=0, atol=1e-4)


def test_weights_are_stored_where_the_operators_read_them() -> None:
    """Blocks of 16 rows; in a block each vector holds four columns of every row; of 4 bits two vectors in one.

    Of 5 bits a fifth vector of a group holds the fifth bits.
    """
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 256, (20, 64), dtype=np.uint8))
    scale = torch.rand(20, 2).half()
    eight = QuantizedLinear("int8", [3, 20], 64, torch.float32, False)
    eight.qweight.zero_()
    eight.store(1, 0, codes, scale, None)
    five = QuantizedLinear("int5", [3, 20], 64, torch.float32, False)
    five.store(1, 0, codes & 31, scale, -scale)
    four = QuantizedLinear("int4", [3, 20], 64, torch.float32, False)
    four.store(1, 0, codes & 15, scale, -scale)
    assert eight.offsets == five.offsets == four.offsets == [0, 16]
    assert eight.qweight.shape == (3, 2, 8, 16, 4)
    assert five.qweight.shape == (3, 2, 5, 16, 4)
    assert four.qweight.shape == (3, 2, 4, 16, 4)
    for row, column in ((0, 0), (5, 7), (15, 63), (16, 36), (19, 31)):
        block, lane, quad, byte = 1 + row // 16, row % 16, column // 4, column % 4
        assert eight.qweight[block, quad // 8, quad % 8, lane, byte] == codes[row, column]
        assert (
            four.qweight[block, quad // 8, quad % 8 // 2, lane, byte] >> 4 * (quad % 2) & 15 == codes[row, column] & 15
        )
        low, fifth = five.qweight[block, column // 32, [quad % 8 // 2, 4], lane, byte].tolist()
        assert (low >> 4 * (quad % 2) & 15) + 16 * (fifth >> quad % 8 & 1) == codes[row, column] & 31
        assert eight.scales[block, column // 32, lane] == scale[row, column // 32]
        assert four.mins[block, column // 32, lane] == -scale[row, column // 32]
    assert not eight.qweight[0].any()
    assert not eight.qweight[2, :, :, 4:].any()


def test_numbers_of_a_group_that_eight_and_four_bits_hold_come_back_exactly() -> None:
    rng = np.random.default_rng(1)
    whole = torch.from_numpy(rng.integers(-127, 128, (9, 96))).float()
    whole[:, ::32] = 127
    eight, four = (
        QuantizedLinear("int8", [9], 96, torch.float32, False),
        QuantizedLinear("int4", [9], 96, torch.float32, False),
    )
    eight.load(0, whole / 64)
    assert torch.equal(floats(eight, 0), whole / 64)
    few = torch.from_numpy(rng.integers(0, 16, (9, 96))).float()
    few[:, ::32], few[:, 1::32] = 0, 15
    four.load(0, few / 8 - 0.75)
    assert torch.equal(floats(four, 0), few / 8 - 0.75)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("value", [0.0, 0.375, -2.5])
def test_equal_numbers_are_no_division_by_zero(kind: str, value: float) -> None:
    matrix = linear_of(kind)([17], 40, torch.float32, True)
    matrix.load(0, torch.full((17, 40), value))
    torch.testing.assert_close(floats(matrix, 0), torch.full((17, 40), value), rtol=1e-3, atol=0)
    assert torch.isfinite(matrix(torch.ones(2, 40))).all()


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e8, -1e8])
def test_what_no_scale_holds_is_refused(kind: str, value: float) -> None:
    weight = torch.zeros(20, 40)
    weight[18, 35] = value
    with pytest.raises(CheckpointFormatError, match=f"^a matrix of 40 columns holds numbers that {kind} cannot"):
        linear_of(kind)([20], 40, torch.float32, True).load(0, weight)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 17])
def test_gradients_of_the_input_flow_through(kind: str, kernels: bool, n: int) -> None:
    first, _, _ = random_matrix(kind, [48], 32, kernels=kernels)
    second, _, _ = random_matrix(kind, [7], 48, kernels=kernels)
    x = torch.from_numpy(np.random.default_rng(n).standard_normal((n, 32))).float().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(second(first(x)).sum(), x)
    expected = torch.ones(n, 7) @ floats(second, 0) @ floats(first, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_matrix_says_what_it_is() -> None:
    matrix, _, _ = random_matrix("int4", [70, 10], 33)
    assert repr(matrix) == "QuantizedLinear(33 -> 70 + 10, int4)"
    assert matrix.n_bytes == 6 * 2 * (256 + 32 + 32)


@pytest.mark.parametrize(
    ("dtype", "device", "yes"),
    [
        (torch.float32, "cpu", True),
        (torch.bfloat16, "cpu", True),
        (torch.float16, "cpu", False),
        (torch.float64, "cpu", False),
        (torch.float32, "meta", False),
    ],
)
def test_where_the_operators_compute(dtype: torch.dtype, device: str, yes: bool) -> None:
    assert supported(dtype, torch.device(device)) is yes
