"""Codes of four bits as a file stores them, against the gguf library's own values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from llama_mini.checkpoint.gguf_file import TensorInfo
from llama_mini.checkpoint.gguf_tensor import read_codes, read_tensor
from llama_mini.errors import CheckpointFormatError

ROWS, COLUMNS = 7, 96


def write(path: Path, kind: Kind) -> TensorInfo:
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    blocks = quants.quantize(values, kind)
    path.write_bytes(b"\0" * 32 + blocks.tobytes())
    return TensorInfo("t", (ROWS, COLUMNS), kind.name, 32, blocks.size)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_codes_scales_and_least_values_are_the_librarys_numbers(tmp_path: Path, kind: Kind) -> None:
    info = write(tmp_path / "blocks", kind)
    with (tmp_path / "blocks").open("rb") as file:
        codes, scale, least = read_codes(file, info)
        expected = read_tensor(file, info)
    assert codes.dtype == torch.uint8
    assert codes.shape == (ROWS, COLUMNS)
    assert codes.max() == 15
    assert scale.shape == least.shape == (ROWS, COLUMNS // 32)
    groups = codes.view(ROWS, -1, 32) * scale.float()[..., None] + least.float()[..., None]
    assert torch.equal(groups.view(ROWS, COLUMNS), expected)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_a_file_that_ends_inside_them_is_named(tmp_path: Path, kind: Kind) -> None:
    info = write(tmp_path / "blocks", kind)
    (tmp_path / "blocks").write_bytes((tmp_path / "blocks").read_bytes()[:-1])
    with (
        (tmp_path / "blocks").open("rb") as file,
        pytest.raises(CheckpointFormatError, match=r"blocks: the file ends inside tensor t; download it again"),
    ):
        read_codes(file, info)
