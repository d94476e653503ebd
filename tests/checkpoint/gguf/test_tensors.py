"""Codes of four and eight bits as a file stores them, against the gguf library's own values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from llama_mini.checkpoint.gguf.header import GGUFTensor
from llama_mini.checkpoint.gguf.tensors import read_blocks, read_rows, read_tensor
from llama_mini.errors import CheckpointFormatError

ROWS, COLUMNS = 7, 96


def write(path: Path, kind: Kind) -> GGUFTensor:
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    blocks = quants.quantize(values, kind)
    path.write_bytes(b"\0" * 32 + blocks.tobytes())
    return GGUFTensor("t", (ROWS, COLUMNS), kind.name, 32, blocks.nbytes)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_codes_scales_and_least_values_are_the_librarys_numbers(tmp_path: Path, kind: Kind) -> None:
    info = write(tmp_path / "blocks", kind)
    with (tmp_path / "blocks").open("rb") as file:
        found = [(first, blocks.unpacked()) for first, blocks in read_blocks(file, info, at_once=2)]
        expected = read_tensor(file, info)
    assert [first for first, _ in found] == list(range(0, ROWS, 2))
    codes, scale, least = (torch.cat(parts) for parts in zip(*(codes for _, codes in found), strict=True))
    assert codes.dtype == torch.uint8
    assert codes.shape == (ROWS, COLUMNS)
    assert codes.max() == 15
    assert scale.shape == least.shape == (ROWS, COLUMNS // 32)
    groups = codes.view(ROWS, -1, 32) * scale.float()[..., None] + least.float()[..., None]
    assert torch.equal(groups.view(ROWS, COLUMNS), expected)


def test_codes_of_eight_bits_are_the_librarys_numbers_down_to_the_lowest(tmp_path: Path) -> None:
    """The library writes −127 at least; others write −128, which is code 0."""
    info = write(tmp_path / "blocks", Kind.Q8_0)
    data = bytearray((tmp_path / "blocks").read_bytes())
    data[info.offset + 2] = 128
    (tmp_path / "blocks").write_bytes(data)
    with (tmp_path / "blocks").open("rb") as file:
        ((first, blocks),) = read_blocks(file, info, at_once=ROWS)
        expected = read_tensor(file, info)
    codes, scale, least = blocks.unpacked()
    assert (first, least) == (0, None)
    assert codes.dtype == torch.uint8
    assert codes[0, 0] == 0
    groups = (codes.view(ROWS, -1, 32).float() - 128) * scale.float()[..., None]
    assert torch.equal(groups.view(ROWS, COLUMNS), expected)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("at_once", [1, 2, ROWS])
def test_rows_are_those_of_the_whole_tensor(tmp_path: Path, kind: Kind, at_once: int) -> None:
    info = write(tmp_path / "blocks", kind)
    with (tmp_path / "blocks").open("rb") as file:
        whole = read_tensor(file, info, torch.bfloat16)
        found = list(read_rows(file, info, torch.bfloat16, at_once))
    assert [first for first, _ in found] == list(range(0, ROWS, at_once))
    assert torch.equal(torch.cat([rows for _, rows in found]), whole)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_a_file_that_ends_inside_them_is_named(tmp_path: Path, kind: Kind) -> None:
    info = write(tmp_path / "blocks", kind)
    (tmp_path / "blocks").write_bytes((tmp_path / "blocks").read_bytes()[:-1])
    with (
        (tmp_path / "blocks").open("rb") as file,
        pytest.raises(CheckpointFormatError, match=r"blocks: the file ends inside tensor 't'; download it again"),
    ):
        list(read_blocks(file, info, at_once=2))
