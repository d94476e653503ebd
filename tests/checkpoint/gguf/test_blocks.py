"""Codes, scales and minima of GGUF blocks, against the gguf library's own values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from llama_mini.checkpoint.code_formats import code_format
from llama_mini.checkpoint.gguf.blocks import CODES, Blocks
from llama_mini.checkpoint.gguf.header import GGUFTensor
from llama_mini.checkpoint.gguf.tensors import read_blocks
from llama_mini.errors import CheckpointFormatError
from tests.checkpoint.code_values import code_values
from tests.checkpoint.gguf.random_blocks import OFFSETS, random_blocks, set_halves


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
    if name == "NVFP4":  # a scale may be any byte
        stored.reshape(-1, 36)[:, :4] = np.random.default_rng(2).integers(0, 256, (rows * 8, 4))
    product, least = code_values(Blocks(torch.from_numpy(stored), name).unpacked(), CODES[name][0])
    with np.errstate(over="ignore", invalid="ignore"):
        found, size = product + least, abs(product) + abs(least)
        expected = quants.dequantize(stored, kind).astype(np.float64)
    held = np.isfinite(found)  # a scale that float16 cannot hold is infinite, which loading refuses
    assert held.all() or (abs(expected).max() > 2**15 and not code_format(CODES[name][0]).super_blocks)
    float32 = 2**-23 * size  # the library multiplies and adds in float32
    assert (abs(found - expected) <= float32)[held].all()


@pytest.mark.parametrize(("name", "plain"), [("Q4_K", "int4"), ("Q5_K", "int5"), ("IQ4_XS", "iq4")])
def test_products_of_scales_are_rounded_once(name: str, plain: str) -> None:
    """Where a matrix is joined with one whose scales are float16."""
    rows = Blocks(torch.from_numpy(random_blocks((64, 512), Kind[name])), name).unpacked()
    exact, found = code_values(rows, CODES[name][0]), code_values(rows.multiplied(), plain)
    size = sum(map(abs, exact))
    assert (abs(sum(found) - sum(exact)) <= 2**-11 * size + 2**-24 * 127).all()


@pytest.mark.parametrize("exponent", [0, 1, 90, 103, 104, 127, 142, 143, 144, 254, 255])
@pytest.mark.parametrize("empty", [False, True])
def test_a_power_of_two_that_float16_cannot_hold_is_infinite(exponent: int, empty: bool) -> None:
    """2⁻²⁴ to 2¹⁵ are held. Below, a scale would become zero without a word; with codes of zero that is right."""
    stored = random_blocks((1, 32), Kind.MXFP4)
    stored[0, 0] = exponent
    stored[0, 1:] = 0 if empty else stored[0, 1:]
    weights = Blocks(torch.from_numpy(stored), "MXFP4").unpacked()
    if -24 <= exponent - 128 <= 15 or (empty and exponent < 128):
        assert np.array_equal(code_values(weights, "mxfp4")[0], quants.dequantize(stored, Kind.MXFP4))
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
