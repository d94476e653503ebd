"""A SentencePiece vocabulary of a GGUF file as byte-pair merges, the form that tokenizer.json has for it.

SentencePiece keeps no list of merges: of all neighbours that together are a piece, it joins those of the highest score
first. Every way to cut a piece into two others is therefore a merge, ranked by the score of what it makes. llama.cpp
does so whatever algorithm the scores were trained for.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any

_SPACE = "▁"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def merges_by_score(pieces: Sequence[str], scores: Sequence[float], ordinary: Collection[int]) -> list[list[str]]:
    """Every pair of ordinary pieces that makes a third, the highest score first. `ordinary` are ids."""
    known = {pieces[id] for id in ordinary}
    lengths = sorted(set(map(len, known)))  # a cut elsewhere makes no two pieces, and one of a million characters many
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

    adds_space: a space goes in front of a text, and of what follows a control token, as llama.cpp and LLaMA 2 have it.
    squeezes_spaces: spaces at both ends are dropped, those in a row made one (remove_extra_whitespaces).
    """
    squeeze = [_replace({"Regex": r"\A +|[ ▁]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    prepend = {"type": "Prepend", "prepend": _SPACE}
    # SentencePiece drops the space in front of a decoded text when either rule may have moved it there.
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *(squeeze if squeezes_spaces else []),
                *([prepend] if adds_space else []),
                _replace({"String": " "}, _SPACE),
            ],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace({"String": _SPACE}, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([strip] if adds_space or squeezes_spaces else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
