"""What befalls files: hypothesis strategies that damage bytes blindly, or knowing the format."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Damaged = tuple[bytes, str]  # and what was done, in words

NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 24, 31, 40, 64, 127, 128, 255, 256, 1000, 65_535, 10**6]
NUMBERS += [n + d for n in (2**31, 2**32, 2**62, 2**63, 2**64) for d in (-1, 0, 1)]
ODD_TEXTS = [
    "",
    " ",
    "\n",
    "a\nb",
    "\0",
    "\ud800",
    "\u2028",
    "\x1b[2J",
    "é",
    "🍎",
    "<|im_end|>",
    "a" * 100_000,
    "../../x",
]
ODD_TEXTS += [
    "/etc/passwd",
    ".",
    "model.safetensors",
    "config.json",
    "model-00001-of-99999.safetensors",
    "(a+)+$",
    "(?=",
    "[",
]
ODD_TEXTS += [
    "{% for i in range(9) %}",
    "{{ messages.__class__ }}",
    "{{ 1/0 }}",
    "{{ undefined.x }}",
    "%s",
    "nan",
    "1e5",
]
ODD_JSON = ["null", "true", "false", "-1", "-0", "-0.0", "0.5", "1e308", "1e400", "-1e400", "1e-320", "NaN", "Infinity"]
ODD_JSON += [
    "-Infinity",
    "9" * 400,
    "9" * 5000,
    "-" + "9" * 5000,
    "0." + "1" * 5000,
    '""',
    "[]",
    "{}",
    "[[]]",
    "[null]",
]
ODD_JSON += ["[" * n + "]" * n for n in (5, 100, 1000, 100_000)] + ['{"a":' * n + "1" + "}" * n for n in (5, 120, 5000)]
ODD_JSON += [
    "[1,2,3]",
    "[" + "0," * 20_000 + "0]",
    "[true]",
    '["a"]',
    '[""]',
    '{"": 0}',
    '{"a": {"b": [1]}}',
    "[[1, 2]]",
]
ODD_JSON += ["tru", "'a'", "1,", "]", '"\\x"', '"\\ud800"', '"a', "/*c*/1", "01", "+1", ".5", "0x10"]
ONE_OR_TWO = st.sampled_from([1, 1, 1, 2])


def odd_json(words: Sequence[str]) -> st.SearchStrategy[str]:
    """A value as it is written, which may be none."""
    return st.one_of(
        st.sampled_from(ODD_JSON),
        st.sampled_from(NUMBERS).map(str),
        st.sampled_from([*words, *ODD_TEXTS]).map(json.dumps),
        st.integers(-300, 300).map(str),
        st.floats(allow_nan=False, allow_infinity=False).map(json.dumps),
        st.text(max_size=8).map(json.dumps),
    )


def blind(draw: Draw, data: bytes) -> Damaged:
    """One to three accidents, most of them in the first kilobytes."""
    notes = []
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(sorted(_ACCIDENTS)))
        begin = _position(draw, data)
        end = min(len(data), begin + draw(st.sampled_from([1, 1, 2, 4, 8, 16, 64, 300, 4000])))
        before = len(data)
        data = _ACCIDENTS[how](draw, data, begin, end)
        notes.append(f"{how} {begin}:{end} ({before} -> {len(data)})")
    return data, ", ".join(notes)


def _position(draw: Draw, data: bytes) -> int:
    reach = draw(st.sampled_from([16, 64, 400, 400, 4000, 4000, len(data)]))
    return draw(st.integers(0, max(min(reach, len(data)) - 1, 0)))


def _flip(draw: Draw, data: bytes, begin: int, end: int) -> bytes:
    if not data:
        return b"\1"
    return data[:begin] + bytes([data[begin] ^ 1 << draw(st.integers(0, 7))]) + data[begin + 1 :]


def _swap(draw: Draw, data: bytes, begin: int, end: int) -> bytes:
    other = draw(st.integers(end, max(len(data), end)))
    length = min(end - begin, len(data) - other)
    if length <= 0:
        return data[end:] + data[:end]
    a, b = data[begin : begin + length], data[other : other + length]
    return data[:begin] + b + data[begin + length : other] + a + data[other + length :]


def _bytes(draw: Draw, n: int) -> bytes:
    number = draw(st.sampled_from(NUMBERS)) & (2**64 - 1)
    return draw(
        st.sampled_from([number.to_bytes(8, "little"), b"\xff" * n, bytes(n), b"}", b'"', b"\n", b"\x80", b"9" * n])
    )


_ACCIDENTS: dict[str, Callable[[Draw, bytes, int, int], bytes]] = {
    "flip": _flip,
    "overwrite": lambda draw, data, begin, end: (
        data[:begin] + (new := _bytes(draw, end - begin)) + data[begin + len(new) :]
    ),
    "insert": lambda draw, data, begin, end: data[:begin] + _bytes(draw, end - begin) + data[begin:],
    "delete": lambda draw, data, begin, end: data[:begin] + data[end:],
    "duplicate": lambda draw, data, begin, end: data[:end] + data[begin:],
    "truncate": lambda draw, data, begin, end: data[:begin],
    "truncate at the end": lambda draw, data, begin, end: data[: len(data) - (end - begin)],
    "append": lambda draw, data, begin, end: data + draw(st.sampled_from([_bytes(draw, end - begin), data])),
    "swap": _swap,
}


def damaged_json(draw: Draw, data: bytes, words: Sequence[str]) -> Damaged:
    root = json.loads(data)
    raw: dict[str, str] = {}
    notes = []

    def odd() -> str:
        mark = f"@raw {len(raw)}@"
        raw[json.dumps(mark)] = draw(odd_json(words))
        return mark

    for _ in range(draw(ONE_OR_TWO)):
        node, path = root, ""
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            path += f"/{key!r:.40}"
            if not isinstance(node[key], dict | list) or not node[key] or not draw(st.booleans()):
                break
            node = node[key]
        how = draw(st.sampled_from(["replace"] * 4 + ["drop", "rename", "duplicate", "add", "add", "exchange"]))
        if not keys or how == "add":
            if isinstance(node, dict):
                node[draw(st.sampled_from([*words, *ODD_TEXTS]))] = odd()
            else:
                node.insert(draw(st.integers(0, len(node))), odd())
        elif how == "replace":
            node[key] = odd()
        elif how == "drop":
            del node[key]
        elif how == "exchange":
            other = draw(st.sampled_from(keys))
            node[key], node[other] = node[other], node[key]
        elif isinstance(node, list):
            node.insert(key, node[key])
        elif how == "rename":
            node[draw(st.sampled_from([*words, *ODD_TEXTS]))] = node.pop(key)
        else:
            mark = f"@name {len(raw)}@"
            raw[json.dumps(mark)] = json.dumps(key)
            node[mark] = draw(st.sampled_from([node[key], odd()]))
        notes.append(f"{how} {path}")
    text = json.dumps(root, ensure_ascii=draw(st.booleans()))
    for mark, fragment in raw.items():
        text = text.replace(mark, fragment)
    shown = ", ".join(fragment[:60] for fragment in raw.values())
    return text.encode("utf-8", "surrogatepass"), f"{'; '.join(notes)} with {shown}"


def damaged_safetensors(draw: Draw, data: bytes, words: Sequence[str]) -> Damaged:
    length = int.from_bytes(data[:8], "little")
    header, note = damaged_json(draw, data[8 : 8 + length], words)
    header += b" " * draw(st.sampled_from([0, 0, -len(header) % 8, 100_000]))
    number = draw(st.sampled_from([len(header)] * 6 + [length, *NUMBERS])) & (2**64 - 1)
    return number.to_bytes(8, "little") + header + data[8 + length :], f"{note}, length {number} for {len(header)}"
