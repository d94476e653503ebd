"""Damage to GGUF files by someone who knows the format."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from tests.checkpoint.fuzz.damage import NUMBERS, ODD_TEXTS, ONE_OR_TWO, Damaged, Draw
from tests.checkpoint.fuzz.gguf import ARRAY, GGUF, SCALARS, STRING, Entry


def damaged_gguf(draw: Draw, data: bytes, words: Sequence[str]) -> Damaged:
    gguf = GGUF.parse(data)
    notes = []
    if draw(st.integers(0, 3)) == 0:
        position, width = draw(st.sampled_from(gguf.marks))
        old = int.from_bytes(data[position : position + width], "little")
        number = draw(st.sampled_from([old - 1, old + 1, *NUMBERS])) % (1 << 8 * width)
        return data[:position] + number.to_bytes(width, "little") + data[position + width :], f"{number} at {position}"
    for _ in range(draw(ONE_OR_TWO)):
        how = draw(
            st.sampled_from(["value"] * 4 + ["item"] * 2 + ["type", "drop", "twice", "rename", "add"] + ["tensor"] * 3)
        )
        entry = draw(st.sampled_from(gguf.entries))
        note = f"{how} {entry.key:.60}"
        if how == "value":
            entry.type, entry.value = _odd_value(draw)
            note += f" {entry.type} {entry.value!r:.60}"
        elif how == "item":
            entry = draw(st.sampled_from([e for e in gguf.entries if e.type == ARRAY] or [entry]))
            note = _damage_array(draw, entry)
        elif how == "type":
            entry.type = draw(st.sampled_from([t for t in [*SCALARS, 13, 99] if entry.type in SCALARS] or [entry.type]))
        elif how == "drop":
            gguf.entries.remove(entry)
        elif how == "twice":
            gguf.entries.append(entry)
        elif how == "rename":
            entry.key = draw(st.sampled_from([*words, *ODD_TEXTS]))
        elif how == "add":
            gguf.entries.append(Entry(draw(st.sampled_from([*words, *ODD_TEXTS])), *_odd_value(draw)))
        else:
            note = _damage_tensor(draw, gguf)
        notes.append(note)
        if not gguf.entries or not gguf.tensors:
            break
    return gguf.to_bytes(), "; ".join(notes)


def _odd_value(draw: Draw) -> tuple[int, Any]:
    kind = draw(st.sampled_from([4, 4, 4, 5, 6, 6, 7, STRING, STRING, ARRAY, 10, 11, 12, 0, 3]))
    if kind == STRING:
        known = ["llama", "gpt2", "qwen2", "yarn", "linear", "none", "default", "smollm", "bert", "gemma2"]
        return kind, draw(st.sampled_from([*ODD_TEXTS, *known]))
    if kind == ARRAY:
        item = draw(st.sampled_from([4, 5, 6, STRING, ARRAY]))
        value = {STRING: "a", ARRAY: (4, [1])}.get(item, 1)
        return kind, (item, [value] * draw(st.sampled_from([0, 1, 2, 3, 300, 2000])))
    if kind in (6, 12):
        return kind, draw(
            st.sampled_from([0.0, -1.0, 1e-45, 1e-6, 0.5, 1.0, 8.0, 1e38, 1e300, float("nan"), float("inf")])
        )
    return kind, draw(st.one_of(st.sampled_from(NUMBERS), st.integers(-5, 300)))


def _damage_array(draw: Draw, entry: Entry) -> str:
    if entry.type != ARRAY or not entry.value[1]:
        return "nothing"
    kind, items = entry.value
    index = draw(st.integers(0, len(items) - 1))
    other = draw(st.integers(0, len(items) - 1))
    odd = st.sampled_from(
        [*ODD_TEXTS, items[other]] if kind == STRING else [items[other], -1, 0, 5, 7, 1e38, float("nan")]
    )
    value = draw(odd)
    value = 0 if kind not in (6, 12, STRING) and value != value else value
    new = draw(
        st.sampled_from([items[:index], [*items, value], [*items[:index], value, *items[index + 1 :]], items[::-1]])
    )
    entry.value = (kind, new)
    return f"{entry.key}[{index}] {value!r:.40}, {len(items)} -> {len(new)}"


def _damage_tensor(draw: Draw, gguf: GGUF) -> str:
    tensor, other = draw(st.sampled_from(gguf.tensors)), draw(st.sampled_from(gguf.tensors))
    how = draw(st.sampled_from(["exchange", "name", "type", "size", "dimensions", "offset", "drop"]))
    if how == "exchange":
        tensor.name, other.name = other.name, tensor.name
    elif how == "name":
        tensor.name = draw(
            st.sampled_from([*ODD_TEXTS, other.name, "rope_freqs.weight", "output.weight", "blk.9.attn_q.bias"])
        )
    elif how == "type":
        tensor.type = draw(st.integers(0, 45))
    elif how == "size":
        tensor.dimensions[draw(st.integers(0, len(tensor.dimensions) - 1))] = draw(st.sampled_from(NUMBERS))
    elif how == "dimensions":
        tensor.dimensions = draw(st.lists(st.sampled_from(NUMBERS), max_size=6))
    elif how == "offset":
        tensor.offset = draw(st.sampled_from([other.offset, *NUMBERS]))
    else:
        gguf.tensors.remove(tensor)
    return f"{how} of {tensor.name!r:.60}"
