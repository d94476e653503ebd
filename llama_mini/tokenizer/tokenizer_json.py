"""The content of tokenizer.json and tokenizer_config.json, for vocabularies that come in another format.

There are two kinds. Byte-level BPE, as in GPT-2, has 256 letters that stand for the bytes of a text. SentencePiece has
scores in place of merges: among neighbours that together form a piece, it first joins those whose piece has the highest
score. So every way to cut a piece into two others is a merge, ranked by the piece's score. llama.cpp does the same for
all SentencePiece models, whichever algorithm trained their scores.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import asdict
from enum import IntEnum
from typing import Any

from llama_mini.tokenizer.config_files import AddedToken

Token = tuple[str, int]  # content and id
PieceType = IntEnum("PieceType", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")  # SentencePiece's and GGUF's
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = map(chr, range(0x100, 0x144))
BYTE_LETTERS = [chr(byte) if byte in _PRINTABLE else next(_OTHERS) for byte in range(256)]  # byte -> GPT-2's letter
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_SPACE = "▁"


def tokenizer_json(
    parts: dict[str, Any], added_tokens: Sequence[AddedToken], bos: Token | None, eos: Token | None = None
) -> dict[str, Any]:
    """`parts` are the normalizer, pre-tokenizer, decoder and model. `bos` goes before a text, `eos` after it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(map(asdict, added_tokens)),
        **parts,
        "post_processor": _frame(bos, eos),
    }


def tokenizer_config(**settings: Any) -> dict[str, Any]:
    """Names the class that uses tokenizer.json as it is: LlamaTokenizer and GPT2Tokenizer replace parts of it."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}


def byte_level_parts(
    vocab: dict[str, int], merges: list[list[str]], splits: Sequence[str | dict[str, Any]], ignore_merges: bool
) -> dict[str, Any]:
    """The parts of byte-level BPE.

    splits: patterns or pre-tokenizers; each splits the pieces that the ones before it made.
    ignore_merges: a word that is a token becomes that token, even if no merges lead there.
    """
    steps = [split(step) if isinstance(step, str) else step for step in splits]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, _BYTE_LEVEL]},
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
        "model": bpe_model(vocab, merges, **({"ignore_merges": True} if ignore_merges else {})),
    }


def sentencepiece_parts(
    vocab: dict[str, int], merges: list[list[str]], unknown: str | None, adds_space: bool, squeezes_spaces: bool
) -> dict[str, Any]:
    """The parts of SentencePiece.

    adds_space: put a space before a text, and before what follows a control token, as llama.cpp and LLaMA 2 do.
    squeezes_spaces: drop spaces at both ends and make one of several in a row (remove_extra_whitespaces).
    """
    squeeze = [_replace({"Regex": r"\A +|[ ▁]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")] if squeezes_spaces else []
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if adds_space else []
    # SentencePiece drops the space before a decoded text when either rule may have changed it.
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space or squeezes_spaces else []
    decoders = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*squeeze, *prepend, _replace({"String": " "}, _SPACE)]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe_model(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


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


def bpe_model(vocab: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """A byte-pair encoding; `settings` override the library's defaults."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        **settings,
        "vocab": vocab,
        "merges": merges,
    }


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    """A pre-tokenizer: each match of the regular expression is a word, and so is the text between matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _frame(bos: Token | None, eos: Token | None) -> dict[str, Any] | None:
    """The post-processor that puts tokens around a text; None for no tokens."""
    tokens = [token for token in (bos, eos) if token is not None]
    if not tokens:
        return None
    before, after = ([{"SpecialToken": {"id": t[0], "type_id": 0}}] if t is not None else [] for t in (bos, eos))
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, second, *after],
        "special_tokens": {content: {"id": content, "ids": [id], "tokens": [content]} for content, id in tokens},
    }
