"""A SentencePiece vocabulary as byte-pair merges, which tokenizer.json needs.

SentencePiece has no list of merges. Among neighbours that together form a piece, it first joins those whose piece has
the highest score. So every way to cut a piece into two others is a merge, ranked by the piece's score. llama.cpp does
the same for all SentencePiece models, whichever algorithm trained their scores.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Any

from llama_mini.tokenizer.tokenizer_json import bpe_model, sequence

_SPACE = "▁"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
PieceType = IntEnum("PieceType", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")  # GGUF's token types, too


def merges_by_score(pieces: Sequence[str], scores: Sequence[float], ordinary: Collection[int]) -> list[list[str]]:
    """Every pair of ordinary pieces that makes a third, the highest score first. `ordinary` are ids."""
    known = {pieces[id] for id in ordinary}
    lengths = sorted(set(map(len, known)))  # only these cuts can give two pieces; a hostile piece may be very long
    return [
        [piece[:cut], piece[cut:]]
        for piece in (pieces[id] for id in sorted(ordinary, key=lambda id: (-scores[id], id)))
        for cut in lengths[: bisect_left(lengths, len(piece))]
        if piece[:cut] in known and piece[cut:] in known
    ]


def sentencepiece_parts(
    vocab: dict[str, int], merges: list[list[str]], unknown: str | None, adds_space: bool, squeezes_spaces: bool
) -> dict[str, Any]:
    """The normalizer, pre-tokenizer, decoder and model of tokenizer.json.

    adds_space: put a space before a text, and before what follows a control token, as llama.cpp and LLaMA 2 do.
    squeezes_spaces: drop spaces at both ends and make one of several in a row (remove_extra_whitespaces).
    """
    squeeze = [_replace({"Regex": r"\A +|[ ▁]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")] if squeezes_spaces else []
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if adds_space else []
    # SentencePiece drops the space before a decoded text when either rule may have changed it.
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space or squeezes_spaces else []
    decoders = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": sequence("normalizers", [*squeeze, *prepend, _replace({"String": " "}, _SPACE)]),
        "pre_tokenizer": None,
        "decoder": sequence("decoders", decoders),
        "model": bpe_model(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
