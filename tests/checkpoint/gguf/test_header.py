"""The header reader against the gguf library's own on whole files, and alone on broken ones."""

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from gguf import quants

from llama_mini.checkpoint.gguf.header import _USUAL_TYPES, GGUFHeader, _ggml_types, read_header
from llama_mini.checkpoint.gguf.tensors import read_tensor
from llama_mini.errors import CheckpointFormatError, CheckpointPathError

SCALARS = {
    "u8": (255, Value.UINT8),
    "i8": (-128, Value.INT8),
    "u16": (65535, Value.UINT16),
    "i16": (-32768, Value.INT16),
    "u32": (2**32 - 1, Value.UINT32),
    "i32": (-(2**31), Value.INT32),
    "f32": (0.1, Value.FLOAT32),
    "yes": (True, Value.BOOL),
    "no": (False, Value.BOOL),
    "text": ("größer, 更大 🦙", Value.STRING),
    "empty": ("", Value.STRING),
    "u64": (2**64 - 1, Value.UINT64),
    "i64": (-(2**63), Value.INT64),
    "f64": (0.1, Value.FLOAT64),
}
ARRAYS = {
    "texts": (["a", "", "字"], Value.STRING),
    "bools": ([True, False, True], Value.BOOL),
    "i32s": ([-1, 0, 2**31 - 1], Value.INT32),
    "u64s": ([2**64 - 1, 0], Value.UINT64),
    "f32s": ([0.1, -2.5], Value.FLOAT32),
    "nested": ([[1, 2], [3]], Value.ARRAY),
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, (value, kind) in SCALARS.items():
        writer.add_key_value(name, value, kind)
    for name, (values, kind) in ARRAYS.items():
        writer.add_key_value(name, values, Value.ARRAY, sub_type=kind)
    rng = np.random.default_rng(0)
    for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0):
        values = rng.standard_normal((3, 5, 64), np.float32)
        writer.add_tensor(f"{kind.name}.weight", quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("vector", rng.standard_normal(16, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_the_gguf_library_reads(whole: Path, version: int) -> None:
    data = bytearray(whole.read_bytes())
    data[4] = version
    whole.write_bytes(data)
    theirs = gguf.GGUFReader(whole)
    ours = read_header(whole)

    assert ours.version == version
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, value in fields.items():
        if name != "nested":  # the library gives only its first element
            np.testing.assert_array_equal(ours.metadata[name], value)
            assert isinstance(ours.metadata[name], np.ndarray) or type(ours.metadata[name]) is type(value), name
    assert [row.tolist() for row in ours.metadata["nested"]] == [[1, 2], [3]]
    for name, (value, kind) in SCALARS.items():
        assert ours.metadata[name] == (np.float32(value) if kind is Value.FLOAT32 else value)

    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for their in theirs.tensors:
        info = ours.tensors[their.name]
        assert info.shape == tuple(reversed(their.shape.tolist()))
        assert (info.type, info.offset, info.n_bytes) == (their.tensor_type.name, their.data_offset, their.n_bytes)


def test_alignment_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert [info.offset for info in header.tensors.values()] == [t.data_offset for t in gguf.GGUFReader(path).tensors]
    with path.open("rb") as file:
        assert read_tensor(file, header.tensors["b"]).tolist() == [0, 1, 2, 3, 4]


def _by_hand(kind: str, block: bytes) -> list[float]:
    """The values of one block of 32, by the format's description, in Python's double precision."""
    if kind == "Q8_0":
        d, *codes = struct.unpack("<e32b", block)
        return [d * q for q in codes]
    if kind == "Q4_0":
        d, *pairs = struct.unpack("<e16B", block)
        return [d * (q - 8) for q in [p & 15 for p in pairs] + [p >> 4 for p in pairs]]
    if kind == "Q4_1":
        d, m, *pairs = struct.unpack("<ee16B", block)
        return [d * q + m for q in [p & 15 for p in pairs] + [p >> 4 for p in pairs]]
    d, m, high, *pairs = struct.unpack("<eeI16B", block) if kind == "Q5_1" else (*_q5_0(block),)
    codes = [p & 15 for p in pairs] + [p >> 4 for p in pairs]
    codes = [q | (high >> i & 1) << 4 for i, q in enumerate(codes)]
    return [d * q + m for q in codes]


def _q5_0(block: bytes) -> tuple[float, ...]:
    d, high, *pairs = struct.unpack("<eI16B", block)
    return (d, -16 * d, high, *pairs)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_are_dequantised(whole: Path, kind: str) -> None:
    header = read_header(whole)
    info = header.tensors[f"{kind}.weight"]
    data = whole.read_bytes()[info.offset : info.offset + info.n_bytes]
    size = info.n_bytes // (3 * 5 * 64 // 32)
    expected = [v for at in range(0, len(data), size) for v in _by_hand(kind, data[at : at + size])]
    with whole.open("rb") as file:
        values = read_tensor(file, info)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, np.reshape(expected, (3, 5, 64)), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize(("kind", "relative"), [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8)])
def test_plain_floats_are_read(whole: Path, kind: str, relative: float) -> None:
    values = np.random.default_rng(0).standard_normal((3, 3, 5, 64), np.float32)[["F32", "F16", "BF16"].index(kind)]
    with whole.open("rb") as file:
        found = read_tensor(file, read_header(whole).tensors[f"{kind}.weight"])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, values, rtol=relative, atol=2**-24 if relative else 0)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _tensor(name: str, dimensions: list[int], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def _file(entries: list[bytes], tensors: list[bytes], data: int = 256, version: int = 3) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)
    return header + bytes(-len(header) % 32 + data)


def _texts(*texts: bytes) -> bytes:
    return struct.pack("<IQ", 8, len(texts)) + b"".join(texts)


def test_the_usual_types_are_the_librarys() -> None:
    assert _USUAL_TYPES.items() <= _ggml_types().items()


HUGE = struct.pack("<Q", 2**63)
FAULTS = {
    "empty": (b"", "not a GGUF file"),
    "short": (b"GGU", "not a GGUF file"),
    "another format": (b"PK\3\4" + bytes(100), "not a GGUF file: it starts with b'PK"),
    "version 1": (_file([], [], version=1), "version 1"),
    "version 4": (_file([], [], version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (b"GGUF" + struct.pack("<I", 3) + HUGE + bytes(100), "9223372036854775808 tensors needs"),
    "entry count": (b"GGUF" + struct.pack("<IQ", 3, 0) + HUGE + bytes(100), "9223372036854775808 metadata entries"),
    "key length": (_file([HUGE + bytes(20)], []), "metadata key 0 needs 9223372036854775808 bytes"),
    "key not UTF-8": (_file([struct.pack("<Q", 1) + b"\xff" + bytes(20)], []), "key 0 is not UTF-8"),
    "string length": (_file([_entry("a", 8, HUGE)], []), "the value of 'a' needs 9223372036854775808 bytes"),
    "length in array": (_file([_entry("a", 9, _texts(_text("b"), HUGE))], []), "of 'a' needs 9223372036854775808"),
    "cut in array": (_file([_entry("a", 9, _texts(_text("b"), HUGE[:3]))], [], data=0), "value of 'a' needs|cut short"),
    "array not UTF-8": (_file([_entry("a", 9, _texts(_text("a")[:-1] + b"\xff"))], []), "value of 'a' is not UTF-8"),
    "value type": (_file([_entry("a", 13, bytes(8))], []), "the value of 'a' has the unknown type 13"),
    "array count": (_file([_entry("a", 9, struct.pack("<I", 4) + HUGE)], []), "elements in the value of 'a' needs"),
    "text array count": (_file([_entry("a", 9, struct.pack("<I", 8) + HUGE)], []), "elements in .* 'a' needs"),
    "element type": (_file([_entry("a", 9, struct.pack("<IQ", 99, 1))], []), "unknown element type 99"),
    "nesting": (_file([_entry("a", 9, struct.pack("<IQ", 9, 1) * 5000)], []), "nested more than 4"),
    "bool": (_file([_entry("a", 7, b"\2")], []), "neither true nor false"),
    "key twice": (_file([_entry("a", 7, b"\1")] * 2, []), "metadata key 'a' occurs twice"),
    "alignment": (_file([_entry("general.alignment", 4, struct.pack("<I", 24))], []), "alignment .* power of two.* 24"),
    "alignment 0": (_file([_entry("general.alignment", 4, bytes(4))], []), "alignment .* power of two"),
    "alignment text": (_file([_entry("general.alignment", 8, _text("x"))], []), "alignment .* power of two"),
    "no dimensions": (_file([], [_tensor("t", [], 0, 0)]), "0 dimensions"),
    "many dimensions": (_file([], [_tensor("t", [1] * 5, 0, 0)]), "5 dimensions"),
    "empty shape": (_file([], [_tensor("t", [4, 0], 0, 0)]), r"shape \(0, 4\)"),
    "shape too big": (_file([], [_tensor("t", [2**63] * 4, 0, 0)]), "tensor 't', F32 .* ends at byte"),
    "tensor type": (_file([], [_tensor("t", [4], 5, 0)]), "unknown type 5; known: F32, F16, Q4_0"),
    "broken block": (_file([], [_tensor("t", [33], 3, 0)]), "rows of 33, which is not a multiple of Q4_1's"),
    "misaligned": (_file([], [_tensor("t", [4], 0, 8)]), "offset 8, .* alignment 32"),
    "offset": (_file([], [_tensor("t", [4], 0, 2**63)]), "tensor 't', F32 .* ends at byte"),
    "overlap": (_file([], [_tensor("t", [16], 0, 0), _tensor("u", [4], 0, 32)]), "tensors 't' and 'u' overlap"),
    "name twice": (_file([], [_tensor("t", [4], 0, 0), _tensor("t", [4], 0, 32)]), "tensor 't' occurs twice"),
    "cut short": (_file([], [_tensor("t", [65], 0, 0)]), "tensor 't', F32 .* but the file has"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_one_sentence(tmp_path: Path, fault: str) -> None:
    data, sentence = FAULTS[fault]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    read_type_names()
    tracemalloc.start()
    with pytest.raises(CheckpointFormatError, match=sentence) as caught:
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert peak < 500_000


def read_type_names() -> None:
    """The gguf library is imported once, before memory is counted."""
    from llama_mini.checkpoint.gguf.header import _ggml_types

    assert _ggml_types()


def test_the_files_of_the_faults_are_sound_without_them(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    entries = [_entry("a", 9, struct.pack("<IQ", 9, 1) * 3 + struct.pack("<IQI", 4, 1, 7)), _entry("b", 7, b"\1")]
    path.write_bytes(_file(entries, [_tensor("t", [64], 0, 0)]))
    header = read_header(path)
    assert np.array(header.metadata["a"]).tolist() == [[[[7]]]]
    assert header.tensors["t"].n_bytes == 256


def test_a_truncation_anywhere_is_refused(whole: Path) -> None:
    header = read_header(whole)
    end = max(info.offset + info.n_bytes for info in header.tensors.values())
    first = min(info.offset for info in header.tensors.values())
    for length in [end - 1, *range(first + 8, 300, -5), *range(300, -1, -1)]:  # 5 divides no size of a field
        os.truncate(whole, length)
        with pytest.raises(CheckpointFormatError):
            read_header(whole)


def test_a_wrong_byte_is_read_or_refused(tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    first = min(info.offset for info in read_header(whole).tensors.values())
    path = tmp_path / "wrong.gguf"
    refused = 0
    for at in [*range(400), *range(400, first, 5)]:
        path.write_bytes(data[:at] + b"\x00\x7f\xff"[at % 3 : at % 3 + 1] + data[at + 1 :])
        try:
            assert isinstance(read_header(path), GGUFHeader)
        except CheckpointFormatError:
            refused += 1
    assert 100 < refused < first


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    path.write_bytes(_file([_entry("k" * 100_000, 99, b"")], []))
    with pytest.raises(CheckpointFormatError) as caught:
        read_header(path)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_a_type_that_has_no_values_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q8k.gguf"
    path.write_bytes(_file([], [_tensor("t", [256], Kind.Q8_K.value, 0)], data=292))
    with path.open("rb") as file, pytest.raises(CheckpointFormatError, match="tensor 't' is Q8_K"):
        read_tensor(file, read_header(path).tensors["t"])


def test_a_file_that_shrinks_is_refused(tmp_path: Path, whole: Path) -> None:
    info = read_header(whole).tensors["vector"]
    whole.write_bytes(whole.read_bytes()[: info.offset + 8])
    with whole.open("rb") as file, pytest.raises(CheckpointFormatError, match="ends inside tensor 'vector'"):
        read_tensor(file, info)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(CheckpointPathError, match=f"cannot read {path}"):
            read_header(path)
