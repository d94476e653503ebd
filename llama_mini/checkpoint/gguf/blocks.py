"""The quantised blocks of a GGUF file as codes with a scale for each group of 32 columns, without requantising.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. The `gguf` library turns blocks into floats.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llama_mini.checkpoint.source import QuantizedWeights

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # what the codes of IQ4 stand for
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # and those of MXFP4, doubled


class Blocks(NamedTuple):
    """Rows of a matrix as a tensor of one of the types in `CODES` stores them: (rows, bytes) uint8."""

    rows: Tensor
    number_format: str

    def unpacked(self) -> QuantizedWeights:
        """Scales that are products in the file are rounded to float16; one that it cannot hold is infinite."""
        _, n_bytes, unpack = CODES[self.number_format]
        codes, scale, least = unpack(self.rows.view(len(self.rows), -1, n_bytes))
        return QuantizedWeights(codes.flatten(1), scale.flatten(1), None if least is None else least.flatten(1))


_Unpacked = tuple[Tensor, Tensor, Tensor | None]  # the fields of QuantizedWeights, for (rows, blocks, bytes)


def _q4_0(blocks: Tensor) -> _Unpacked:
    scale = _float16(blocks, 0)
    return _nibbles(blocks[..., 2:], 16), scale, -8 * scale


def _q4_1(blocks: Tensor) -> _Unpacked:
    return _nibbles(blocks[..., 4:], 16), _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: Tensor) -> _Unpacked:
    scale = _float16(blocks, 0)
    return _nibbles(blocks[..., 6:], 16) | _high_bits(blocks[..., 2:6]), scale, -16 * scale


def _q5_1(blocks: Tensor) -> _Unpacked:
    codes = _nibbles(blocks[..., 8:], 16) | _high_bits(blocks[..., 4:8])
    return codes, _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: Tensor) -> _Unpacked:
    return blocks[..., 2:] + 128, _float16(blocks, 0), None


def _q4_k(blocks: Tensor) -> _Unpacked:
    return _nibbles(blocks[..., 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: Tensor) -> _Unpacked:
    high = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]  # bit g of a byte belongs to group g
    return _nibbles(blocks[..., 48:], 32) | ((high & 1) << 4).flatten(-2), *_k_scales(blocks)


def _iq4_nl(blocks: Tensor) -> _Unpacked:
    return _looked_up(_nibbles(blocks[..., 2:], 16), _IQ4), _float16(blocks, 0), None


def _iq4_xs(blocks: Tensor) -> _Unpacked:
    """Eight groups: four low bits of each scale, group by group, and two high ones in 16 bits before them."""
    low = torch.stack((blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4), -1).flatten(-2)
    high = (blocks[..., 2:4, None] >> torch.arange(0, 8, 2, dtype=torch.uint8) & 3).flatten(-2)
    scale = _float16(blocks, 0).float() * ((low | high << 4).float() - 32)
    return _looked_up(_nibbles(blocks[..., 8:], 16), _IQ4), scale.half(), None


def _mxfp4(blocks: Tensor) -> _Unpacked:
    codes = _looked_up(_nibbles(blocks[..., 1:], 16), _FP4)
    scale = torch.exp2(blocks[..., :1].float() - 128).half()  # a power of two
    too_small = (scale == 0) & (codes != 128).any(-1, keepdim=True)
    return codes, torch.where(too_small, torch.inf, scale), None


# Type -> the format of ours whose codes its blocks hold, the bytes of a block, and how to unpack it.
CODES: dict[str, tuple[str, int, Callable[[Tensor], _Unpacked]]] = {
    "Q4_0": ("int4", 18, _q4_0),
    "Q4_1": ("int4", 20, _q4_1),
    "Q4_K": ("int4", 144, _q4_k),
    "Q5_0": ("int5", 22, _q5_0),
    "Q5_1": ("int5", 24, _q5_1),
    "Q5_K": ("int5", 176, _q5_k),
    "Q8_0": ("int8", 34, _q8_0),
    "IQ4_NL": ("int8", 18, _iq4_nl),
    "IQ4_XS": ("int8", 136, _iq4_xs),
    "MXFP4": ("int8", 17, _mxfp4),
}


def _float16(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor, width: int) -> Tensor:
    """Four-bit codes: of every `width` bytes first the low halves, then the high ones."""
    packed = packed.unflatten(-1, (-1, width))
    return torch.stack((packed & 15, packed >> 4), -2).flatten(-3)


def _high_bits(packed: Tensor) -> Tensor:
    """The fifth bit of each code, in place, from a number of 32 bits."""
    return ((packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1) << 4).flatten(-2)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups of a K-quant: numbers of six bits, times a float16 for the whole block.

    The first four of each lie in the low bits of eight bytes; four bits of the others follow, with their two highest
    bits in the high bits of those eight.
    """
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    least = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return (_float16(blocks, 0).float() * scale).half(), -(_float16(blocks, 2).float() * least).half()


def _looked_up(codes: Tensor, table: tuple[int, ...]) -> Tensor:
    """The whole numbers that codes stand for, as codes of eight bits."""
    return torch.tensor([128 + value for value in table], dtype=torch.uint8)[codes.int()]
