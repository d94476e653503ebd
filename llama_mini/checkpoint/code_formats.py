"""The formats in which a matrix is held in memory as codes: whole numbers of a few bits that share scales."""

from collections.abc import Collection
from dataclasses import dataclass, replace

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # GGUF's kvalues_iq4nl
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # FP4 of MX and NVFP4, doubled
# The quantiles of NF4 (QLoRA, Dettmers 2023), in steps of 1/112, which suit them best; those of bitsandbytes' FP4 are
# multiples of 1/12, but for 1/192, and so of 1/120.
_NF4 = (-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112)
_FP4 = (0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30)


@dataclass(frozen=True)
class CodeFormat:
    """Codes of 2 to 8 bits, with a float16 scale, and maybe a minimum, for each `group` columns of a row.

    A code stands for scale · code + min with `has_min`, scale · table[code] with a table (16 whole numbers from -128
    to 127), and else scale · (code − 2^(bits − 1)).
    """

    bits: int
    group: int = 32
    has_min: bool = True
    table: tuple[int, ...] | None = None

    def n_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, without the padding that it may need in memory."""
        return rows * columns * self.bits // 8 + rows * -(-columns // self.group) * 2 * (1 + self.has_min)


FORMATS = {
    **{f"int{bits}": CodeFormat(bits) for bits in (2, 3, 4, 5, 6)},
    "int4sym": CodeFormat(4, has_min=False),  # Q4_0
    "int8": CodeFormat(8, has_min=False),
    "int2g16": CodeFormat(2, 16),  # Q2_K
    "int3g16": CodeFormat(3, 16, False),  # Q3_K
    "int6g16": CodeFormat(6, 16, False),  # Q6_K
    "iq4": CodeFormat(4, 32, False, _IQ4),
    "mxfp4": CodeFormat(4, 32, False, _E2M1),
    "nvfp4": CodeFormat(4, 16, False, _E2M1),
    "nf4": CodeFormat(4, 32, False, _NF4),
    "fp4": CodeFormat(4, 32, False, _FP4),
}
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
    formats = {name: code_format(name) for name in names}
    widest = max(names, key=lambda name: (formats[name].bits, -formats[name].group, formats[name].has_min))
    group = min(kind.group for kind in formats.values())
    common = grouped(widest, group) if group >= 32 else widest
    return common if all(holds_codes(common, name) for name in names) else "int8"


def holds_codes(wanted: str, kept: str) -> bool:
    """Whether codes of the format `kept` are codes of `wanted` too, perhaps with their scales repeated.

    Five bits with a minimum hold four, with one or without, and groups of 32 hold those of 64.
    """
    one, other = code_format(wanted), code_format(kept)
    same_kind = one.table == other.table and one.has_min >= other.has_min
    wide_enough = one.bits >= other.bits if one.has_min else one.bits == other.bits
    return same_kind and wide_enough and other.group % one.group == 0


def _parts(name: str) -> tuple[str, int]:
    """The one of FORMATS whose name a name begins with, and its group."""
    if name in FORMATS:
        return name, FORMATS[name].group
    base, _, group = name.removesuffix("row").partition("g")
    return base, int(group or ROW)
