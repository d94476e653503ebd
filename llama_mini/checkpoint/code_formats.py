"""The formats in which a matrix is held in memory as codes: whole numbers of a few bits that share scales."""

from collections.abc import Collection
from dataclasses import dataclass, replace

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # GGUF's kvalues_iq4nl
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # FP4 of MX and NVFP4, doubled
# The quantiles of NF4 (QLoRA, Dettmers 2023), in steps of 1/112, which suit them best; those of bitsandbytes' FP4 are
# multiples of 1/12, but for 1/192, and so of 1/120.
_NF4 = (-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112)
_FP4 = (0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30)


SUPER_BLOCK = 256  # columns whose int8 scales have a common factor


@dataclass(frozen=True)
class CodeFormat:
    """Codes of 2 to 8 bits, with a scale, and maybe a minimum, for each `group` columns of a row.

    These are float16; with `super_blocks`, as in GGUF's K-quants, int8, times a float16 each for 256 columns.
    A code stands for scale · code + min with `has_min`, scale · table[code] with a table (16 whole numbers from -128
    to 127), and else scale · (code − 2^(bits − 1)).
    """

    bits: int
    group: int = 32
    has_min: bool = True
    table: tuple[int, ...] | None = None
    super_blocks: bool = False

    def n_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, without the padding that it may need in memory."""
        n_scales, n_super = -(-columns // self.group), -(-columns // SUPER_BLOCK) if self.super_blocks else 0
        of_scales = (n_scales * (1 if self.super_blocks else 2) + 2 * n_super) * (1 + self.has_min)
        return rows * columns * self.bits // 8 + rows * of_scales


FORMATS = {
    **{f"int{bits}": CodeFormat(bits) for bits in (2, 3, 4, 5, 6)},
    "int4sym": CodeFormat(4, has_min=False),  # Q4_0
    "int8": CodeFormat(8, has_min=False),
    "q2_k": CodeFormat(2, 16, super_blocks=True),
    "q3_k": CodeFormat(3, 16, False, super_blocks=True),
    "q4_k": CodeFormat(4, super_blocks=True),
    "q5_k": CodeFormat(5, super_blocks=True),
    "q6_k": CodeFormat(6, 16, False, super_blocks=True),
    "iq4": CodeFormat(4, 32, False, _IQ4),
    "iq4_xs": CodeFormat(4, 32, False, _IQ4, super_blocks=True),
    "mxfp4": CodeFormat(4, 32, False, _E2M1),
    "nvfp4": CodeFormat(4, 16, False, _E2M1),
    "nf4": CodeFormat(4, 32, False, _NF4),
    "fp4": CodeFormat(4, 32, False, _FP4),
}
_PLAIN = {"q4_k": "int4", "q5_k": "int5", "iq4_xs": "iq4"}  # the same codes, with scales of float16
ROW = 1 << 30  # the group of a format with a scale for each row, however long that is


def code_format(name: str) -> CodeFormat:
    """One of FORMATS, or one with larger groups, by the name that `grouped` gives it."""
    if name in FORMATS:
        return FORMATS[name]
    base, group = _parts(name)
    return replace(FORMATS[base], group=group)


def grouped(name: str, group: int) -> str:
    """The name of a format with this group, a power of two from 32 on: int4, int4g64, int4g128, ..., or int4row."""
    base, _ = _parts(name)
    return base + {FORMATS[base].group: "", ROW: "row"}.get(group, f"g{group}")


def common_format(names: Collection[str]) -> str:
    """The format of matrices that are joined into one: the most bits and the smallest groups, if it holds the codes of
    all; else int8.
    """
    if not all(code_format(name).super_blocks for name in names):
        names = [_PLAIN.get(name, name) for name in names]
    formats = {name: code_format(name) for name in names}
    widest = max(names, key=lambda name: (formats[name].bits, -formats[name].group, formats[name].has_min))
    group = min(kind.group for kind in formats.values())
    common = grouped(widest, group) if group >= 32 else widest
    return common if all(holds_codes(common, name) for name in names) else "int8"


def holds_codes(wanted: str, kept: str) -> bool:
    """Whether codes of the format `kept` are codes of `wanted` too, perhaps with their scales repeated.

    Five bits with a minimum hold four, with one or without, and groups of 32 hold those of 64. Scales of float16 hold
    products, rounded.
    """
    one, other = code_format(wanted), code_format(kept)
    same_kind = one.table == other.table and one.has_min >= other.has_min and one.super_blocks <= other.super_blocks
    wide_enough = one.bits >= other.bits if one.has_min else one.bits == other.bits
    return same_kind and wide_enough and other.group % one.group == 0


def _parts(name: str) -> tuple[str, int]:
    """The one of FORMATS whose name a name begins with, and its group."""
    if name in FORMATS:
        return name, FORMATS[name].group
    base, _, group = name.removesuffix("row").partition("g")
    return base, int(group or ROW)
