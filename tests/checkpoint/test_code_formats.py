"""The formats of codes: their tables against those of the libraries that write them, and which holds which."""

import itertools
from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional
from compressed_tensors.compressors.nvfp4.base import unpack_fp4_from_uint8
from gguf import quants

from llama_mini.checkpoint.code_formats import FORMATS, ROW, code_format, common_format, grouped, holds_codes

STEPS = {"nf4": 112, "fp4": 120}


@pytest.mark.parametrize(("name", "kind"), [("iq4", quants.IQ4_NL), ("mxfp4", quants.MXFP4), ("nvfp4", quants.NVFP4)])
def test_tables_of_gguf(name: str, kind: type) -> None:
    assert FORMATS[name].table == tuple(kind.kvalues)


def test_fp4_of_compressed_tensors() -> None:
    packed = torch.arange(16, dtype=torch.uint8)[:, None]  # a code in the low half of each byte
    numbers = unpack_fp4_from_uint8(packed, 16, 2, torch.float32)[:, 0]
    assert FORMATS["mxfp4"].table == FORMATS["nvfp4"].table == tuple((2 * numbers).int().tolist())


@pytest.mark.parametrize("name", STEPS)
def test_tables_of_bitsandbytes(name: str) -> None:
    """Rounded to the steps in which they are most exact."""
    table = functional.get_4bit_type(name, device="cpu").double()
    found = torch.tensor(FORMATS[name].table).double()
    assert torch.equal((table * STEPS[name]).round(), found)
    steps = torch.arange(16, 127.5, 0.25).double()
    errors = ((table[:, None] * steps).round() / steps - table[:, None]).square().sum(0)
    assert (found / STEPS[name] - table).square().sum() <= errors.min() * 1.001


@pytest.mark.parametrize("name", FORMATS)
def test_a_code_of_a_table_is_a_signed_byte(name: str) -> None:
    table = FORMATS[name].table
    if table is not None:
        assert FORMATS[name].bits == 4
        assert len(table) == 16
        assert all(-128 <= value <= 127 for value in table)


def test_bits_per_weight() -> None:
    expected = {"int2": 3, "int4": 5, "int6": 7, "int8": 8.5, "iq4": 4.5}
    expected |= {"q2_k": 3.125, "q3_k": 3.5625, "q4_k": 4.625, "q5_k": 5.625, "q6_k": 6.5625, "iq4_xs": 4.3125}
    expected |= {"mxfp4": 4.5, "nvfp4": 5, "nf4": 4.5, "int4sym": 4.5}
    expected |= {"int4g64": 4.5, "int4g128": 4.25, "int8g64": 8.25, "int8row": 8.0625, "int2g256": 2.125}
    assert {name: code_format(name).n_bytes(16, 256) * 8 / 4096 for name in expected} == expected
    assert code_format("int4g128").n_bytes(3, 160) == 3 * (80 + 2 * 2 * 2)  # the second group is cut


def test_names_of_formats_with_larger_groups() -> None:
    for name, group in (("int4", 64), ("int2", 256), ("int8", ROW)):
        assert code_format(grouped(name, group)) == replace(FORMATS[name], group=group)
        assert grouped(grouped(name, group), 32) == name
    assert [grouped("int4", group) for group in (32, 128, ROW)] == ["int4", "int4g128", "int4row"]


def test_a_common_format_holds_the_codes_of_all_or_is_int8() -> None:
    larger = ["int4g64", "int5g128", "int8g64", "int8row"]
    for names in itertools.combinations_with_replacement([*FORMATS, *larger], 3):
        found = common_format(names)
        assert found == common_format(names[::-1])
        kinds, of_all = [code_format(name) for name in names], code_format(found)
        holding = [wanted for wanted in names if all(holds_codes(wanted, name) for name in names)]
        if holding:
            assert found in holding
        if found != "int8":  # no more bits and no smaller groups than one of them has
            assert all(holds_codes(found, name) for name in names)
            assert of_all.bits == max(kind.bits for kind in kinds)
            assert of_all.group == min(kind.group for kind in kinds)
    assert common_format(["int4", "int5", "int3"]) == "int5"
    assert common_format(["int4sym", "int4"]) == common_format(["int4", "int4sym"]) == "int4"
    assert common_format(["int4sym", "int5"]) == "int5"
    assert common_format(["int4g64", "int5g128", "int3row"]) == "int5g64"
    assert common_format(["int5g128", "int4"]) == "int5"
    assert common_format(["int8g64", "int8row"]) == "int8g64"
    assert common_format(["int8row", "int4g128"]) == "int8"
    assert common_format(["q2_k", "int4g64"]) == "int8"  # whose scales are for 16 columns of two bits alone
    assert common_format(["q4_k", "q5_k"]) == "q5_k"
    assert common_format(["q4_k", "int4"]) == common_format(["int4sym", "q4_k"]) == "int4"
    assert common_format(["q5_k", "int4g64"]) == "int5"
    assert common_format(["iq4_xs", "iq4"]) == "iq4"
    for names in (["q4_k", "q6_k"], ["nf4", "fp4"], ["int4", "iq4"]):
        assert common_format(names) == "int8"
