"""Codes, scales and minima of GGUF blocks, against the gguf library's own values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from llama_mini.checkpoint.gguf.blocks import CODES, Blocks
from llama_mini.checkpoint.gguf.header import GGUFTensor
from llama_mini.checkpoint.gguf.tensors import read_blocks
from llama_mini.checkpoint.source import QuantizedWeights
from llama_mini.errors import CheckpointFormatError
from tests.checkpoint.gguf.random_blocks import OFFSETS, random_blocks, set_halves

PRODUCTS = ("Q4_K", "Q5_K", "IQ4_XS")  # types whose scales are products, which float16 rounds
LEVELS = {"int4": 15, "int5": 31, "int8": 255}


def widened(weights: QuantizedWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in float64, (rows, columns), and the sizes of their two terms together, which bound the rounding."""
    codes = weights.codes.view(*weights.scale.shape, 32).double()
    products = (codes if weights.min is not None else codes - 128) * weights.scale.double()[..., None]
    least = torch.zeros(1) if weights.min is None else weights.min.double()[..., None]
    return (products + least).flatten(1), (products.abs() + least.abs()).flatten(1)


@pytest.mark.parametrize("name", CODES)
def test_codes_are_the_librarys_numbers(name: str) -> None:
    """Any bytes, with any finite scales: subnormal, negative, zero, or too large for their product."""
    kind, rows = Kind[name], 64
    stored = random_blocks((rows, 512), kind)
    if name in OFFSETS:
        blocks = stored.reshape(-1, GGML_QUANT_SIZES[kind][1])
        bits = np.random.default_rng(1).integers(0, 0x7C00, (len(blocks), len(OFFSETS[name])), dtype="<u2")
        bits[:4] = [[0], [1], [0x3FF], [0x7BFF]]
        bits[::3] |= 0x8000
        set_halves(blocks, kind, bits.view("<f2"))
    weights = Blocks(torch.from_numpy(stored), name).unpacked()
    assert weights.codes.dtype == torch.uint8
    assert weights.codes.max() <= LEVELS[CODES[name][0]]
    assert weights.scale.dtype == torch.float16
    assert weights.scale.shape == (rows, 512 // 32)
    assert (weights.min is None) is (CODES[name][0] == "int8")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = torch.from_numpy(quants.dequantize(stored, kind)).double()
    found, size = widened(weights)
    held = found.isfinite()  # a scale that float16 cannot hold is infinite, which loading refuses
    assert held.all() or expected.abs().max() > 2**15
    rounding = 2**-11 if name in PRODUCTS else 0
    float32 = 2**-23 * size  # the library multiplies and adds in float32
    assert ((found - expected).abs() <= rounding * size + float32)[held].all()


@pytest.mark.parametrize("exponent", [0, 1, 90, 103, 104, 127, 142, 143, 144, 254, 255])
@pytest.mark.parametrize("empty", [False, True])
def test_a_power_of_two_that_float16_cannot_hold_is_infinite(exponent: int, empty: bool) -> None:
    """2⁻²⁴ to 2¹⁵ are held. Below, a scale would become zero without a word; with codes of zero that is right."""
    stored = random_blocks((1, 32), Kind.MXFP4)
    stored[0, 0] = exponent
    stored[0, 1:] = 0 if empty else stored[0, 1:]
    weights = Blocks(torch.from_numpy(stored), "MXFP4").unpacked()
    if -24 <= exponent - 128 <= 15 or (empty and exponent < 128):
        assert torch.equal(widened(weights)[0], torch.from_numpy(quants.dequantize(stored, Kind.MXFP4)).double())
    else:
        assert weights.scale.isinf().all()


@pytest.mark.parametrize("name", CODES)
def test_a_file_that_ends_inside_them_is_named(tmp_path: Path, name: str) -> None:
    stored = random_blocks((7, 512), Kind[name])
    (tmp_path / "blocks").write_bytes(stored.tobytes()[:-1])
    info = GGUFTensor("t", (7, 512), name, 0, stored.nbytes)
    with (
        (tmp_path / "blocks").open("rb") as file,
        pytest.raises(CheckpointFormatError, match=r"blocks: the file ends inside tensor 't'; download it again"),
    ):
        list(read_blocks(file, info, at_once=2))
