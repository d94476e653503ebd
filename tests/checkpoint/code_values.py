"""What codes stand for, from the definition of their format, in NumPy with float64."""

import numpy as np
import torch
from numpy.typing import NDArray

from llama_mini.checkpoint.code_formats import code_format
from llama_mini.checkpoint.source import QuantizedWeights


def code_values(rows: QuantizedWeights, kept: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two terms whose sum is the value, (rows, columns) both: scale times a number, and minimum."""
    bits, group, table = code_format(kept).bits, code_format(kept).group, code_format(kept).table
    codes, scale, least = rows
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert (least is not None) == code_format(kept).has_min
    of_column = np.arange(codes.shape[1]) // group
    scales, minima = (
        np.zeros(codes.shape) if part is None else part.double().numpy()[:, of_column] for part in (scale, least)
    )
    assert {part.dtype for part in (scale, least) if part is not None} == {torch.float16}
    numbers = codes.double().numpy()
    if table is not None:
        numbers = np.array(table, np.float64)[codes.numpy()]
    elif least is None:
        numbers -= 2 ** (bits - 1)
    with np.errstate(invalid="ignore"):  # infinity times zero
        return scales * numbers, minima


def joined(chunks: list[QuantizedWeights]) -> QuantizedWeights:
    """Rows one after another."""
    codes, scale, least = zip(*chunks, strict=True)
    return QuantizedWeights(torch.cat(codes), torch.cat(scale), None if least[0] is None else torch.cat(least))
