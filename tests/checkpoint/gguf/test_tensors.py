"""Rows of a file's tensors, against the gguf library's own values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from llama_mini.checkpoint.gguf.header import GGUFTensor
from llama_mini.checkpoint.gguf.tensors import read_blocks, read_rows, read_tensor

ROWS, COLUMNS = 7, 96


def write(path: Path, kind: Kind) -> GGUFTensor:
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    blocks = quants.quantize(values, kind)
    path.write_bytes(b"\0" * 32 + blocks.tobytes())
    return GGUFTensor("t", (ROWS, COLUMNS), kind.name, 32, blocks.nbytes)


def test_codes_of_eight_bits_are_the_librarys_numbers_down_to_the_lowest(tmp_path: Path) -> None:
    """The library writes −127 at least; others write −128, which is code 0."""
    info = write(tmp_path / "blocks", Kind.Q8_0)
    data = bytearray((tmp_path / "blocks").read_bytes())
    data[info.offset + 2] = 128
    (tmp_path / "blocks").write_bytes(data)
    with (tmp_path / "blocks").open("rb") as file:
        ((first, blocks),) = read_blocks(file, info, at_once=ROWS)
        expected = read_tensor(file, info)
    codes, scale, least, _ = blocks.unpacked()
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
