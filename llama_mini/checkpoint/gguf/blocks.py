"""The quantised blocks of a GGUF file as codes with a scale for each group of 32 columns, without requantising."""

from typing import NamedTuple

import torch
from torch import Tensor

from llama_mini.checkpoint.source import QuantizedWeights

_SCALE_BYTES = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}  # bytes of float16 before the codes in a block of 32 columns


class Blocks(NamedTuple):
    """Rows of a matrix as a Q4_0, Q4_1 or Q8_0 tensor stores them, block after block: (rows, bytes) uint8."""

    rows: Tensor
    number_format: str

    def unpacked(self) -> QuantizedWeights:
        n_codes = 32 if self.number_format == "Q8_0" else 16  # bytes of codes in a block; the others are float16
        n_bytes = _SCALE_BYTES[self.number_format] + n_codes
        blocks = self.rows.view(len(self.rows), -1, n_bytes)
        floats = blocks[..., :-n_codes].contiguous().view(torch.float16)
        scale, stored = floats[..., 0], blocks[..., -n_codes:]
        if self.number_format == "Q8_0":
            return QuantizedWeights((stored + 128).flatten(1), scale, None)
        codes = torch.cat((stored & 15, stored >> 4), dim=-1).flatten(1)
        return QuantizedWeights(codes, scale, floats[..., 1] if self.number_format == "Q4_1" else -8 * scale)
