"""A GGUF file taken apart and put together again, sound or not: the fuzz test changes what lies between."""

import math
import struct
from dataclasses import dataclass
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class Entry:
    """`value` is a number, a string, or for an array its type and its items."""

    key: str
    type: int
    value: Any


@dataclass
class Tensor:
    name: str
    dimensions: list[int]
    type: int
    offset: int


@dataclass
class GGUF:
    """`marks` are the places of all lengths, counts, types and offsets: position and width in bytes."""

    entries: list[Entry]
    tensors: list[Tensor]
    data: bytes
    marks: list[tuple[int, int]]

    @classmethod
    def parse(cls, data: bytes) -> "GGUF":
        """A sound file of version 3; nothing is checked."""
        at = _Cursor(data)
        at.number("I"), at.number("I")
        n_tensors, n_entries = at.number("Q"), at.number("Q")
        entries = []
        for _ in range(n_entries):
            key, kind = at.text(), at.number("I")
            entries.append(Entry(key, kind, at.value(kind)))
        tensors = []
        for _ in range(n_tensors):
            name = at.text()
            dimensions = [at.number("Q") for _ in range(at.number("I"))]
            tensors.append(Tensor(name, dimensions, at.number("I"), at.number("Q")))
        start = -(-at.position // ALIGNMENT) * ALIGNMENT
        return cls(entries, tensors, data[start:], at.marks)

    def to_bytes(self) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))
        head += b"".join(_text(e.key) + struct.pack("<I", e.type) + _packed(e.type, e.value) for e in self.entries)
        for tensor in self.tensors:
            dimensions = b"".join(_packed(10, size) for size in tensor.dimensions)
            head += _text(tensor.name) + _packed(4, len(tensor.dimensions)) + dimensions
            head += _packed(4, tensor.type) + _packed(10, tensor.offset)
        return head + bytes(-len(head) % ALIGNMENT) + self.data


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.marks: list[tuple[int, int]] = []

    def number(self, form: str) -> Any:
        size = struct.calcsize(form)
        self.marks.append((self.position, size))
        self.position += size
        return struct.unpack_from("<" + form, self.data, self.position - size)[0]

    def text(self) -> str:
        length = self.number("Q")
        self.position += length
        return self.data[self.position - length : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        item = self.number("I")
        n = self.number("Q")
        n_marks = len(self.marks)
        items = [self.value(item) for _ in range(n)]
        del self.marks[n_marks + 3 :]  # the first few items stand for the others
        return item, items


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _packed(kind: int, value: Any) -> bytes:
    """The value as a type that may not be its own: what does not fit is cut."""
    if kind == ARRAY:
        item, items = value if isinstance(value, tuple | list) and len(value) == 2 else (0, [])
        return struct.pack("<IQ", item, len(items)) + b"".join(_packed(item, x) for x in items)
    if kind == STRING:
        return _text(value)
    form = SCALARS.get(kind, "I")
    if form in "fd":
        try:
            return struct.pack("<" + form, float(value))
        except OverflowError:
            return struct.pack("<" + form, float("inf"))
    size, whole = struct.calcsize(form), int(value) if math.isfinite(value) else 0  # also of "?", a byte
    return (whole % (1 << 8 * size)).to_bytes(size, "little")
