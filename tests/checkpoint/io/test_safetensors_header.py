"""Headers of safetensors files: every fault is one sentence, and only what the library takes is taken."""

import json
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llama_mini.checkpoint.hf.safetensors_data import read_rows
from llama_mini.checkpoint.io.safetensors_header import SafetensorsTensor, read_header, stamp_of, weight_dtype
from llama_mini.errors import CheckpointFormatError, CheckpointPathError

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16) | dict.fromkeys(("I32", "U32", "F32"), 32)
BITS |= dict.fromkeys(("C64", "F64", "I64", "U64"), 64)
TWO = {
    "norm.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "head.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = bytes(range(32))
ENTRY = json.dumps(TWO["norm.weight"]).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


def built(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(data: bytes = bytes(24), name: str = "a", **changes: Any) -> bytes:
    """A file of one tensor, some of its entry changed; None leaves a key out."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    return built({name: {key: value for key, value in entry.items() if value is not None}}, data)


def two(**offsets: list[int]) -> bytes:
    a, b = {"dtype": "F32", "shape": [2]}, {"dtype": "F32", "shape": [2]}
    return built({"a": a | {"data_offsets": offsets["a"]}, "b": b | {"data_offsets": offsets["b"]}}, bytes(16))


FAULTS = {
    "empty": (b"", "is not a safetensors file but empty"),
    "7 bytes": (b"\x08\0\0\0\0\0\0", "refuses it (header too small)"),
    "header longer than the file": (built(TWO, b"", 5000), "refuses it (invalid header length)"),
    "header of 2**64 - 1 bytes": (built(TWO, DATA, 2**64 - 1), "refuses it (header too large)"),
    "header of over 100 MB": (built(TWO, DATA, 100_000_001), "refuses it (header too large)"),
    "not JSON": (built(b"{]"), "invalid JSON in header: key must be a string"),
    "header of no bytes": (built(b"", b""), "invalid JSON in header: EOF"),
    "text after the header": (built(b"{} {}", b""), "invalid JSON in header: trailing characters"),
    "byte order mark": (built(b"\xef\xbb\xbf" + json.dumps(TWO).encode()), "invalid JSON in header: expected value"),
    "not UTF-8": (built(b'{"\xff": 1}'), "invalid UTF-8 in header: invalid utf-8 sequence of 1 bytes from index 2"),
    "not an object": (built(b"[1, 2]"), "invalid JSON in header: invalid type: sequence"),
    "nested 5,000 deep": (
        built(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        "invalid JSON in header: recursion limit exceeded",
    ),
    "nested 500 deep": (
        one(more=json.loads("[" * 500 + "]" * 500)),
        "invalid JSON in header: recursion limit exceeded",
    ),
    "number of 5,000 digits": (built(b'{"a": ' + b"1" * 5000 + b"}"), "invalid JSON in header: number out of range"),
    "number beyond a float": (built(b'{"a": 1e999}'), "invalid JSON in header: number out of range"),
    "NaN": (built(b'{"a": NaN}'), "invalid JSON in header: expected value"),
    "half a surrogate pair": (built(b'{"\\ud800": {}}'), "invalid JSON in header: unexpected end of hex escape"),
    "Git LFS pointer": (LFS, "is not a safetensors file but a Git LFS pointer: run `git lfs pull`"),
    "HTML page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "but an HTML page"),
    "JSON text": (json.dumps({"weight_map": {}}).encode(), "but JSON text"),
    "PyTorch pickle": (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(90), "but a PyTorch pickle"),
    "zip": (b"PK\x03\x04" + bytes(26) + b"weights.npy" + bytes(90), "but an archive"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "but a GGUF file: give its path"),
    "overlap": (two(a=[0, 8], b=[4, 12]), "invalid offset for tensor `b`"),
    "hole": (two(a=[0, 8], b=[12, 20]), "invalid offset for tensor `b`"),
    "hole at the start": (one(bytes(32), data_offsets=[8, 32]), "invalid offset for tensor `a`"),
    "reversed": (one(data_offsets=[24, 0]), "invalid offset for tensor `a`"),
    "negative offset": (one(data_offsets=[-24, 0]), "invalid value: integer `-24`"),
    "three offsets": (one(data_offsets=[0, 24, 24]), "invalid length 3, expected 2 elements"),
    "offset a float": (one(data_offsets=[0, 24.0]), "invalid type: floating point `24.0`"),
    "offset a boolean": (one(data_offsets=[False, 24]), "invalid type: boolean `false`"),
    "offset a string": (one(data_offsets="0,24"), 'invalid type: string "0,24"'),
    "too few bytes for the shape": (
        one(bytes(20), data_offsets=[0, 20]),
        "invalid shape, data type, or offset for tensor",
    ),
    "half a byte": (one(bytes(2), dtype="F4", shape=[3], data_offsets=[0, 2]), "does not end up at a byte boundary"),
    "shape overflows": (one(shape=[2**32, 2**32]), "overflow computing buffer size"),
    "shape of 100,000 sizes": (one(shape=[2**62] * 100_000), "overflow computing buffer size"),
    "size of 2**63": (one(shape=[2**63]), "overflow computing buffer size"),
    "negative size": (one(shape=[-2, -3]), "invalid value: integer `-2`"),
    "size -0": (
        built(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
        "invalid type: floating point `-0.0`",
    ),
    "size a float": (one(shape=[2.0, 3.0]), "invalid type: floating point `2.0`"),
    "size a boolean": (one(bytes(4), shape=[True], data_offsets=[0, 4]), "invalid type: boolean `true`"),
    "shape a number": (one(shape=6), "invalid type: integer `6`, expected a sequence"),
    "unknown dtype": (one(dtype="Q4_K"), "unknown variant `Q4_K`, expected one of `BOOL`, `F4`"),
    "dtype a list": (one(dtype=["F32"]), "invalid type: sequence"),
    "no dtype": (one(dtype=None), "missing field `dtype`"),
    "no object": (built({"a": [1]}), "invalid type: integer `1`"),
    "name twice": (built(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", bytes(24)), "its header holds the name 'a' twice"),
    "name of metadata twice": (
        built(b'{"__metadata__":{"b":"1","b":"2"},"a":' + ENTRY + b"}", bytes(24)),
        "its header holds the name 'b' twice",
    ),
    "entry a list": (built({"a": ["F32", [2, 3], [0, 24]]}, bytes(24)), "must have dtype, shape and data_offsets, but"),
    "dtype an object": (one(dtype={"F32": None}), "must have dtype, shape and data_offsets, but is {'dtype'"),
    "dtype twice": (built(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "duplicate field `dtype`"),
    "no tensors": (built({}, b""), "it holds no tensors"),
    "metadata alone": (built({"__metadata__": {"format": "pt"}}, b""), "it holds no tensors"),
    "trailing bytes": (built(TWO, DATA + bytes(5)), "file not fully covered"),
    "truncated": (built(TWO, DATA[:20]), "file not fully covered"),
    "no data": (built(TWO, b""), "file not fully covered"),
    "metadata a list": (built({"__metadata__": ["pt"]} | TWO), "invalid type: sequence, expected a map"),
    "metadata of numbers": (built({"__metadata__": {"a": 1}} | TWO), "invalid type: integer `1`, expected a string"),
    "long name": (built({"x" * 10**6: [1]}), "invalid type: integer `1`"),
    "name of several lines": (
        one(name="a\nb\u2028c", data_offsets=[1, 25]),
        "invalid offset for tensor `a\\nb\\u2028c`",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_sentence_at_once_and_in_little_memory(tmp_path: Path, case: str) -> None:
    content, expected = FAULTS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(CheckpointFormatError) as caught:
            read_header(path)
        assert time.perf_counter() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 20 * len(content) + 10**6
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 350


def test_a_header_that_is_really_there_and_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**36) + b"{")
        file.truncate(2**37)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointFormatError, match="header too large"):
        read_header(path)


def test_what_is_no_file_is_refused_and_nothing_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "pipe"):
        with pytest.raises(CheckpointPathError, match=f"cannot read {path}"):
            read_header(path)


def test_the_header_tells_each_tensor_in_the_order_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(built({"__metadata__": {"format": "pt"}, **dict(reversed(TWO.items()))}))
    stamp, start = stamp_of(path.stat()), path.stat().st_size - 32
    assert list(read_header(path).items()) == [
        ("norm.weight", SafetensorsTensor("norm.weight", path, stamp, (2, 3), "F32", start, start + 24)),
        ("head.weight", SafetensorsTensor("head.weight", path, stamp, (4,), "BF16", start + 24, start + 32)),
    ]


@pytest.mark.parametrize(
    "content",
    [
        built({"__metadata__": None} | TWO),
        built(b"  \n" + json.dumps(TWO).encode() + b"   \t\r\n"),
        one(more={"nested": [1, 2.5, None]}),
        one(bytes(4), shape=[], data_offsets=[0, 4]),
        one(b"", shape=[3, 0], data_offsets=[0, 0]),
        one(b"", shape=[0, 2**62, 4], data_offsets=[0, 0]),
        built({"日本 \U0001f999": TWO["norm.weight"]}, bytes(24)),
    ],
    ids=["metadata null", "spaces", "unknown key", "scalar", "nothing in it", "overflow beside 0", "unicode"],
)
def test_what_is_odd_but_valid_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert library_verdict(path)
    assert verdict(path) == library_verdict(path)


Verdict = dict[str, tuple[tuple[int, ...], str]] | None
STRICTER = "twice|no tensors|must have dtype, shape and data_offsets"


def verdict(path: Path) -> Verdict:
    """Ours; raises where the file is refused."""
    return {info.name: (info.shape, info.dtype) for info in read_header(path).values()}


def library_verdict(path: Path) -> Verdict:
    """None: refused."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in slices.items()}
    except Exception:
        return None


def test_the_dtypes_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one(dtype="none"))
    with pytest.raises(Exception, match="unknown variant") as caught, safe_open(path, framework="pt"):
        pass
    assert set(re.findall("`([A-Z0-9_a-z]+)`", str(caught.value))) - {"none"} == set(BITS)


@pytest.mark.parametrize("dtype", BITS)
def test_each_dtype_has_the_librarys_size(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one(bytes(BITS[dtype]), dtype=dtype, shape=[8], data_offsets=[0, BITS[dtype]]))
    assert verdict(path) == library_verdict(path) == {"a": ((8,), dtype)}


ODD = ["0", "1", "-1", "-0", "2.0", "1e2", "1e999", "NaN", "true", "null", "[]", "{}", "[[1]]", "\x01", "1" * 300]
ODD += ['""', '"F16"', '"F8_E4M3"', r'"\ud800"', r'"\ud83d\ude00"', r'"\n"', "1" * 400]
ODD += [str(2**62), str(2**63), str(2**64)]
ODD += ["[" * 123 + "]" * 123, "[" * 130 + "]" * 130]
TOKENS = re.findall(r'"[^"]*"|\d+|[^\s]', json.dumps({"__metadata__": {"format": "pt"}, **TWO}))


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A valid file with some words of its header, its length or some bytes changed, or entries added."""
    tokens = list(TOKENS)
    for _ in range(draw(st.integers(0, 3))):
        word = draw(st.sampled_from(ODD + TOKENS))
        at = draw(st.integers(0, len(tokens) - 1))
        kind = draw(st.sampled_from(["add", "add", "replace", "insert", "delete", "copy"]))
        if kind == "add":
            at = draw(st.sampled_from([i for i, token in enumerate(tokens) if token == "{"] or [0]))
            tokens[at + 1 : at + 1] = [
                draw(st.sampled_from(['"a"', '"shape"', '""', '"__metadata__"'])),
                ":",
                word,
                ",",
            ]
        elif kind == "copy":
            tokens[at : at + 1] = tokens[at - 6 : at + 1]
        else:
            tokens[at : at + (kind != "insert")] = [] if kind == "delete" else [word]
    kept = draw(st.sampled_from([len(DATA)] * 12 + [0, 31]))
    content = bytearray(built(" ".join(tokens).encode(), DATA[:kept] + bytes(draw(st.sampled_from([0] * 12 + [1, 8])))))
    for _ in range(draw(st.sampled_from([0] * 12 + [1, 2]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@settings(max_examples=300, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(broken_files())
def test_the_library_agrees_on_every_verdict(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "mutant.safetensors"
    path.write_bytes(content)
    try:
        found, reason = verdict(path), ""
    except CheckpointFormatError as error:
        found, reason = None, str(error)
    assert re.search(STRICTER, reason) or found == library_verdict(path), reason


@pytest.mark.parametrize(
    ("dtype", "what"),
    [
        ("F8_E4M3", r"is quantised to 8 bits \(F8_E4M3\)"),
        ("F4", r"is quantised to 4 bits \(F4\)"),
        ("I64", r"holds integers \(I64\)"),
        ("U8", r"holds integers \(U8\)"),
        ("BOOL", r"holds truth values \(BOOL\)"),
        ("C64", r"holds complex numbers \(C64\)"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(tmp_path: Path, dtype: str, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one(bytes(BITS[dtype]), dtype=dtype, shape=[8], data_offsets=[0, BITS[dtype]]))
    (info,) = read_header(path).values()
    message = f"{path}: tensor 'a' {what}, but weights must be F64, F32, F16, BF16"
    with pytest.raises(CheckpointFormatError, match=message):
        weight_dtype(info)
    with pytest.raises(CheckpointFormatError, match=message):
        next(read_rows([info]))
