"""Random blocks of any GGUF type with scales that a test chooses: the gguf library quantises only a few types."""

from collections.abc import Sequence

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

# Where a block has float16 numbers. MXFP4 and NVFP4 have bytes with an exponent, IQ1_M four bits in four places.
HALVES: dict[str, Sequence[int]] = {
    "Q4_0 Q5_0 Q8_0 IQ4_NL IQ4_XS IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ3_S IQ2_S": (0,),
    "Q4_1 Q5_1 Q4_K Q5_K": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
OFFSETS = {name: offsets for names, offsets in HALVES.items() for name in names.split()}


def random_blocks(shape: tuple[int, ...], kind: Kind, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """A tensor of `shape` whose codes are random bytes, as bytes; its scales are of about this size, of both signs."""
    rng = np.random.default_rng(seed)
    columns, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, size), dtype=np.uint8)
    if kind in (Kind.MXFP4, Kind.NVFP4):
        exponents, low = (1, 120) if kind == Kind.MXFP4 else (4, 40)
        blocks[..., :exponents] = rng.integers(low, low + 8, (*blocks.shape[:-1], exponents))
    elif kind == Kind.IQ1_M:
        blocks[..., 49:57:2] = blocks[..., 49:57:2] & 15 | np.array([0, 0, 0, 0x20], np.uint8)  # 2⁻⁷
    else:
        halves = rng.normal(0, scale, (*blocks.shape[:-1], len(OFFSETS[kind.name]))).astype("<f2")
        set_halves(blocks, kind, halves)
    return blocks.reshape(*shape[:-1], -1)


def set_halves(blocks: np.ndarray, kind: Kind, halves: np.ndarray) -> None:
    """Writes the float16 numbers of blocks, (..., bytes); `halves` (..., how many a block has)."""
    for i, offset in enumerate(OFFSETS[kind.name]):
        blocks[..., offset : offset + 2] = np.ascontiguousarray(halves[..., i, None]).view(np.uint8)
