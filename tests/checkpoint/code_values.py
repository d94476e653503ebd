"""What codes stand for, from the definition of their format, in NumPy with float64."""

import numpy as np
import torch
from numpy.typing import NDArray

from llama_mini.checkpoint.code_formats import code_format
from llama_mini.checkpoint.source import QuantizedWeights


def code_values(rows: QuantizedWeights, kept: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two terms whose sum is the value, (rows, columns) both: scale times a number, and minimum."""
    bits, group, table = code_format(kept).bits, code_format(kept).group, code_format(kept).table
    codes, scale, least, super_scales = rows
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert (least is not None) == code_format(kept).has_min
    of_column, super_block = np.arange(codes.shape[1]) // group, np.arange(codes.shape[1]) // 256
    scales, minima = (
        np.zeros(codes.shape) if part is None else part.double().numpy()[:, of_column] for part in (scale, least)
    )
    stored = torch.float16 if super_scales is None else torch.int8
    assert {part.dtype for part in (scale, least) if part is not None} == {stored}
    assert (super_scales is not None) == code_format(kept).super_blocks
    if super_scales is not None:
        assert super_scales.dtype == torch.float16
        factors = super_scales.double().numpy().reshape(len(codes), -1, 1 if least is None else 2)[:, super_block]
        with np.errstate(invalid="ignore"):
            scales, minima = scales * factors[..., 0], minima * factors[..., -1]
    numbers = codes.double().numpy()
    if table is not None:
        numbers = np.array(table, np.float64)[codes.numpy()]
    elif least is None:
        numbers -= 2 ** (bits - 1)
    with np.errstate(invalid="ignore"):  # infinity times zero
        return scales * numbers, minima


def joined(chunks: list[QuantizedWeights]) -> QuantizedWeights:
    """Rows one after another."""
    return QuantizedWeights(*(None if each[0] is None else torch.cat(each) for each in zip(*chunks, strict=True)))
