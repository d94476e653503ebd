"""Scales that several times 32 columns share: the bits of the same matrix with its scales repeated, in every way."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llama_mini.checkpoint.code_formats import ROW, code_format, grouped
from llama_mini.checkpoint.source import QuantizedWeights
from llama_mini.optimize.build import ISA_VARIANTS
from llama_mini.optimize.quantized_linear import QuantizedLinear
from tests.optimize.layer_twins import Step
from tests.optimize.random_layers import random_prompt, random_step, same_caches
from tests.optimize.twins import each_isa, generator, random, random_codes, same_bits

BASES = ["int2", "int3", "int4", "int5", "int6", "int8"]
GROUPS = [64, 128, 256, ROW]
op = torch.ops.llama_mini
isa = pytest.fixture(scope="module", params=ISA_VARIANTS)(each_isa)


def shared_and_repeated(
    base: str, group: int, parts: Sequence[int], columns: int, dtype: torch.dtype, seed: int, bias: bool = False
) -> tuple[QuantizedLinear, QuantizedLinear]:
    """The same numbers, with a scale for each group, and with one for each 32 columns."""
    rng = generator(seed)
    shared, repeated = (
        QuantizedLinear(name, parts, columns, dtype, True, bias) for name in (grouped(base, group), base)
    )
    for part, rows in enumerate(parts):
        codes, scale, least, _ = random_codes(shared.name, rows, columns, rng)
        shared.load_codes(part, QuantizedWeights(codes, scale, least))
        of_each = torch.arange(0, columns, 32) // group
        again = QuantizedWeights(codes, scale[:, of_each], None if least is None else least[:, of_each])
        repeated.load_codes(part, again)
    return shared, repeated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("base", BASES)
def test_products_and_rows(isa: str, base: str, group: int, dtype: torch.dtype) -> None:
    """Few rows and many, in matrices whose last group is whole, cut, or the only one."""
    for columns in (32, 96, 256, 416):
        shared, repeated = shared_and_repeated(base, group, [40, 23], columns, dtype, columns)
        assert shared.scales.shape[1] == -(-columns // group)
        for n in (1, 3, 16, 37):
            x = random((n, columns), dtype, generator(n))
            assert same_bits(shared(x), repeated(x))
        rows = torch.arange(shared.rows)
        assert same_bits(shared.lookup(rows), repeated.lookup(rows))
        off = copy.deepcopy(shared)
        off.kernels = False
        torch.testing.assert_close(off.lookup(rows), shared.lookup(rows), rtol=1e-2, atol=1e-6)


def with_matrices(step: Step, base: str, group: int) -> list[Step]:
    """The same layers, whose matrices have a scale for each group, and for each 32 columns."""
    made = [
        [shared_and_repeated(base, group, m.parts, m.columns, m.dtype, i) for i, m in enumerate(layer.matrices)]
        for layer in step.layers
    ]
    return [
        step._replace(
            layers=[
                layer._replace(matrices=[both[which] for both in pairs], k=layer.k.clone(), v=layer.v.clone())
                for layer, pairs in zip(step.layers, made, strict=True)
            ]
        )
        for which in range(2)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("base", "group"), [("int4", 64), ("int3", 128), ("int8", ROW)])
def test_layers(isa: str, base: str, group: int, dtype: torch.dtype) -> None:
    """A step of decoding and a prompt; q, k and v, and gate and up, begin at blocks of their own."""
    decoding = random_step(1, "float", dtype, 3, 2, 2, 16, 96, 160)
    prompt = random_prompt(2, "float", dtype, 5, 21, 2, 2, 16, 96, 160, bias=False)
    for step in (decoding, prompt):
        shared, repeated = with_matrices(step, base, group)
        assert same_bits(shared.run(), repeated.run())
        assert same_caches(shared, repeated)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_format_of_smaller_groups_and_more_bits_takes_them(isa: str, kernels: bool) -> None:
    """As where q, k and v have groups of different sizes."""
    for kept, wanted in (("int4g128", "int4g64"), ("int3row", "int5g128"), ("int8row", "int8"), ("int2g64", "int2")):
        for columns in (96, 416):
            weights = random_codes(kept, 40, columns, generator(columns))
            own, other = (QuantizedLinear(name, [40], columns, torch.float32, kernels) for name in (kept, wanted))
            for matrix in (own, other):
                matrix.load_codes(0, weights)
            rows = torch.arange(40)
            assert torch.equal(own.lookup(rows), other.lookup(rows))


def test_floats_are_not_quantised_to_them(isa: str) -> None:
    def stored(name: str) -> list[Tensor]:
        return QuantizedLinear(name, [20], 64, torch.float32, True).tensors

    for name in ("int4g64", "int8row"):
        assert code_format(name).group >= 64
        with pytest.raises(RuntimeError, match=r"floats become int8, or groups of 32 with a minimum"):
            op.quantize(torch.ones(20, 64), stored(name), 0)
