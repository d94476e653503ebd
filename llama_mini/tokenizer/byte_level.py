"""Byte-level BPE, as in GPT-2: a vocabulary in which 256 letters stand for the bytes of a text."""

from collections.abc import Sequence
from typing import Any

from llama_mini.tokenizer.tokenizer_json import bpe_model, sequence, split

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = map(chr, range(0x100, 0x144))
BYTE_LETTERS = [chr(byte) if byte in _PRINTABLE else next(_OTHERS) for byte in range(256)]  # byte -> GPT-2's letter
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def byte_level_parts(
    vocab: dict[str, int], merges: list[list[str]], splits: Sequence[str | dict[str, Any]], ignore_merges: bool
) -> dict[str, Any]:
    """The normalizer, pre-tokenizer, decoder and model of tokenizer.json.

    splits: patterns or pre-tokenizers; each splits the pieces that the ones before it made.
    ignore_merges: a word that is a token becomes that token, even if no merges lead there.
    """
    steps = [split(step) if isinstance(step, str) else step for step in splits]
    return {
        "normalizer": None,
        "pre_tokenizer": sequence("pretokenizers", [*steps, _BYTE_LEVEL]),
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
        "model": bpe_model(vocab, merges, **({"ignore_merges": True} if ignore_merges else {})),
    }
