"""The quantised blocks of a GGUF file as codes of one of our own formats, without requantising.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. The `gguf` library turns blocks into floats.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llama_mini.checkpoint.source import QuantizedWeights


class Blocks(NamedTuple):
    """Rows of a matrix as a tensor of one of the types in `CODES` stores them: (rows, bytes) uint8."""

    rows: Tensor
    number_format: str

    def unpacked(self) -> QuantizedWeights:
        """A scale of MXFP4, a power of two, that float16 cannot hold is infinite."""
        _, n_bytes, unpack = CODES[self.number_format]
        codes, scale, least, *super_scales = unpack(self.rows.view(len(self.rows), -1, n_bytes))
        least = None if least is None else least.flatten(1)
        return QuantizedWeights(codes.flatten(1), scale.flatten(1), least, *(each.flatten(1) for each in super_scales))


# The fields of QuantizedWeights, for (rows, blocks, bytes).
_Unpacked = tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor]


def _q4_0(blocks: Tensor) -> _Unpacked:
    return _fields(blocks[..., 2:], 4, 16), _float16(blocks, 0), None


def _q4_1(blocks: Tensor) -> _Unpacked:
    return _fields(blocks[..., 4:], 4, 16), _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: Tensor) -> _Unpacked:
    scale = _float16(blocks, 0)
    return _fields(blocks[..., 6:], 4, 16) | _fields(blocks[..., 2:6], 1, 1) << 4, scale, -16 * scale


def _q5_1(blocks: Tensor) -> _Unpacked:
    codes = _fields(blocks[..., 8:], 4, 16) | _fields(blocks[..., 4:8], 1, 1) << 4
    return codes, _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: Tensor) -> _Unpacked:
    return blocks[..., 2:] + 128, _float16(blocks, 0), None


def _q2_k(blocks: Tensor) -> _Unpacked:
    """A byte for each 16 columns: the low half times a float16 of the block is the scale, the high half the minimum."""
    scale, least = blocks[..., :16] & 15, blocks[..., :16] >> 4
    return _fields(blocks[..., 16:80], 2, 32), scale.view(torch.int8), -least.view(torch.int8), _float16(blocks, 80, 2)


def _q3_k(blocks: Tensor) -> _Unpacked:
    """The third bits come first. Of the scales' six bits, four lie in eight bytes and two in four bytes after them."""
    codes = _fields(blocks[..., 32:96], 2, 32) | _fields(blocks[..., :32], 1, 32) << 2
    scale = _fields(blocks[..., 96:104], 4, 8) | _fields(blocks[..., 104:108], 2, 4) << 4
    return codes, scale.view(torch.int8) - 32, None, _float16(blocks, 108)


def _q4_k(blocks: Tensor) -> _Unpacked:
    return _fields(blocks[..., 16:], 4, 32), *_k_scales(blocks)


def _q5_k(blocks: Tensor) -> _Unpacked:
    return _fields(blocks[..., 48:], 4, 32) | _fields(blocks[..., 16:48], 1, 32) << 4, *_k_scales(blocks)


def _q6_k(blocks: Tensor) -> _Unpacked:
    codes = _fields(blocks[..., :128], 4, 64) | _fields(blocks[..., 128:192], 2, 32) << 4
    return codes, blocks[..., 192:208].view(torch.int8), None, _float16(blocks, 208)


def _iq4_nl(blocks: Tensor) -> _Unpacked:
    return _fields(blocks[..., 2:], 4, 16), _float16(blocks, 0), None


def _iq4_xs(blocks: Tensor) -> _Unpacked:
    """Eight groups: four low bits of each scale, group by group, and two high ones in 16 bits before them."""
    scale = _fields(blocks[..., 4:8], 4, 1) | _fields(blocks[..., 2:4], 2, 1) << 4
    return _fields(blocks[..., 8:], 4, 16), scale.view(torch.int8) - 32, None, _float16(blocks, 0)


def _mxfp4(blocks: Tensor) -> _Unpacked:
    codes = _fields(blocks[..., 1:], 4, 16)
    scale = torch.exp2(blocks[..., :1].float() - 128).half()  # a power of two
    too_small = (scale == 0) & (codes & 7 != 0).any(-1, keepdim=True)
    return codes, torch.where(too_small, torch.inf, scale), None


def _nvfp4(blocks: Tensor) -> _Unpacked:
    """Scales in FP8 without its sign. 127 is zero, where FP8 has NaN."""
    stored = blocks[..., :4]
    scale = (stored & 127).view(torch.float8_e4m3fn).half().nan_to_num(480) / 2
    return _fields(blocks[..., 4:], 4, 8), torch.where(stored == 127, 0, scale), None


def _tq1_0(blocks: Tensor) -> _Unpacked:
    """Five digits of base 3 to a byte, four in the last four bytes: a byte is their number, times 256 / 243."""
    digits = [
        (packed[..., None, :] * torch.tensor([1, 3, 9, 27, 81][:n], dtype=torch.uint8)[:, None]).flatten(-2)
        for packed, n in ((blocks[..., :32], 5), (blocks[..., 32:48], 5), (blocks[..., 48:52], 4))
    ]
    scale = _float16(blocks, 52)
    return (torch.cat(digits, -1).int() * 3 >> 8).to(torch.uint8), scale, -scale


def _tq2_0(blocks: Tensor) -> _Unpacked:
    scale = _float16(blocks, 64)
    return _fields(blocks[..., :64], 2, 32), scale, -scale


# Type -> the format of ours whose codes its blocks hold, the bytes of a block, and how to unpack it.
CODES: dict[str, tuple[str, int, Callable[[Tensor], _Unpacked]]] = {
    "Q4_0": ("int4sym", 18, _q4_0),
    "Q4_1": ("int4", 20, _q4_1),
    "Q5_0": ("int5", 22, _q5_0),
    "Q5_1": ("int5", 24, _q5_1),
    "Q8_0": ("int8", 34, _q8_0),
    "Q2_K": ("q2_k", 84, _q2_k),
    "Q3_K": ("q3_k", 110, _q3_k),
    "Q4_K": ("q4_k", 144, _q4_k),
    "Q5_K": ("q5_k", 176, _q5_k),
    "Q6_K": ("q6_k", 210, _q6_k),
    "IQ4_NL": ("iq4", 18, _iq4_nl),
    "IQ4_XS": ("iq4_xs", 136, _iq4_xs),
    "MXFP4": ("mxfp4", 17, _mxfp4),
    "NVFP4": ("nvfp4", 36, _nvfp4),
    "TQ1_0": ("int2g256", 54, _tq1_0),
    "TQ2_0": ("int2g256", 66, _tq2_0),
}


def _float16(blocks: Tensor, at: int, n: int = 1) -> Tensor:
    return blocks[..., at : at + 2 * n].contiguous().view(torch.float16)


def _fields(packed: Tensor, bits: int, width: int) -> Tensor:
    """Numbers of a few bits: of every `width` bytes first the lowest bits of each, then the next ones, and so on."""
    packed = packed.unflatten(-1, (-1, width))
    return torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -2).flatten(-3)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minima of the eight groups of a K-quant, numbers of six bits, and a float16 each for the whole block.

    The first four of each lie in the low bits of eight bytes; four bits of the others follow, with their two highest
    bits in the high bits of those eight.
    """
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    least = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return scale.view(torch.int8), -least.view(torch.int8), _float16(blocks, 0, 2)
