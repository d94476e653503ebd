"""Damage to tokenizer.model, of tiktoken and of SentencePiece, and to pickles, by someone who knows the formats."""

import io
import struct
import zipfile
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.checkpoint.fuzz.damage import NUMBERS, ODD_TEXTS, Damaged, Draw, blind


def damaged_tiktoken(draw: Draw, data: bytes, words: Sequence[str]) -> Damaged:
    lines = data.splitlines(keepends=True)
    index, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    token, _, rank = lines[index].partition(b" ")
    odd = [
        b"",
        b"\n",
        b"= 5\n",
        token + b"\n",
        token + b" -1\n",
        token + b" " + b"9" * 5000 + b"\n",
        b"A" * 9999 + b" " + rank,
    ]
    odd += [
        token + b"  " + rank,
        b"Zg==\t" + rank,
        token[:-1] + b" " + rank,
        lines[other],
        b"\xff\xfe" + lines[index],
        b"{",
    ]
    odd += [lines[index].replace(b"\n", b"\r\n"), lines[index].replace(b"\n", b"\x0b"), lines[index] * 2]
    how = draw(st.sampled_from(["replace", "drop", "exchange", "more"]))
    if how == "more":
        lines += [b"YWI= %d\n" % len(lines), draw(st.sampled_from(odd))]
    elif how == "exchange":
        lines[index], lines[other] = lines[other], lines[index]
    else:
        lines[index] = draw(st.sampled_from(odd)) if how == "replace" else b""
    return b"".join(lines), f"{how} line {index + 1}: {lines[index][:60]!r}"


def damaged_protobuf(draw: Draw, data: bytes, words: Sequence[str], depth: int = 0) -> Damaged:
    """A message of the nesting that SentencePiece has."""
    fields = _fields(data)
    if not fields:
        return draw(st.sampled_from([b"\x08", b"\x0a\xff\xff\xff\xff\x0f"])), "a field of an empty message"
    index = draw(st.integers(0, len(fields) - 1) if draw(st.booleans()) else st.sampled_from([0, len(fields) - 1]))
    number, wire, content = fields[index]
    note = f"field {number} ({index} of {len(fields)})"
    how = draw(st.sampled_from(["inside"] * 6 + ["drop", "twice", "number", "wire", "length", "exchange", "content"]))
    if how == "inside" and wire == 2 and depth == 0:
        content, inner = damaged_protobuf(draw, content, words, depth + 1)
        fields[index] = (number, wire, content)
        return _message(fields), f"{note}: {inner}"
    if how == "drop":
        del fields[index]
    elif how == "twice":
        fields.insert(index, fields[index])
    elif how == "number":
        fields[index] = (draw(st.sampled_from([0, 1, 2, 3, 4, 15, 24, 2**29 - 1])), wire, content)
    elif how == "wire":
        fields[index] = (number, draw(st.integers(0, 7)), content)
    elif how == "length":
        whole = _message(fields[:index]) + _varint(number << 3 | 2) + _varint(draw(st.sampled_from(NUMBERS)))
        return whole + content + _message(fields[index + 1 :]), f"{note}: length"
    elif how == "exchange":
        other = draw(st.integers(0, len(fields) - 1))
        fields[index], fields[other] = fields[other], fields[index]
    elif wire == 0:
        fields[index] = (number, wire, _varint(draw(st.sampled_from(NUMBERS))))
    elif wire == 5:
        odd = [0.0, -1.0, 1e38, float("nan"), float("inf"), float("-inf")]
        fields[index] = (number, wire, struct.pack("<f", draw(st.sampled_from(odd))))
    else:
        texts = [text.encode("utf-8", "surrogatepass") for text in ODD_TEXTS] + [
            b"\xff",
            "▁".encode(),
            b"<0x0A>",
            b"<unk>",
        ]
        fields[index] = (number, wire, draw(st.sampled_from(texts)))
    return _message(fields), f"{note}: {how}"


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Number, wire type and content of a message's fields; what does not look like a message has none."""
    fields, position = [], 0
    while position < len(data):
        key, position = _read_varint(data, position)
        start = position
        if key & 7 == 0:
            _, position = _read_varint(data, position)
        elif key & 7 == 2:
            length, start = _read_varint(data, position)
            position = start + length
        elif key & 7 in (1, 5):
            position += 8 if key & 7 == 1 else 4
        else:
            return []
        fields.append((key >> 3, key & 7, data[start:position]))
    return fields


def _message(fields: list[tuple[int, int, bytes]]) -> bytes:
    return b"".join(
        _varint(number << 3 | wire) + (_varint(len(content)) if wire == 2 else b"") + content
        for number, wire, content in fields
    )


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            break
    return value, position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def damaged_pickle(draw: Draw, data: bytes, words: Sequence[str]) -> Damaged:
    """The archive is sound again after one of its files, most often the pickle itself, was not."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w") as new:
        names = old.namelist()
        damaged = draw(st.sampled_from([next(n for n in names if n.endswith("data.pkl"))] * 4 + names))
        for name in names:
            content = old.read(name)
            if name == damaged:
                content, note = blind(draw, content)
            new.writestr(name, content)
    return written.getvalue(), f"{damaged}: {note}"
