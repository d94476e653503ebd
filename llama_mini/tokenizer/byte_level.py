"""Byte-level BPE, as in GPT-2: how a text is split into words, and how a vocabulary writes bytes.

The splits are those of llama.cpp (src/llama-vocab.cpp), under the names that GGUF files give in tokenizer.ggml.pre.
"""

from typing import Any

from llama_mini.tokenizer.tokenizer_json import bpe_model, sequence, split

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = map(chr, range(0x100, 0x144))
BYTE_LETTERS = [chr(byte) if byte in _PRINTABLE else next(_OTHERS) for byte in range(256)]  # byte -> GPT-2's letter
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _gpt_4_words(number: str) -> str:
    """The split of GPT-4. Models that use it differ in how many digits make a word."""
    letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return f"{letters}|{number}|{others}"


def _splits(*patterns: str) -> dict[str, Any]:
    """Each pattern splits the pieces that the ones before it made. ByteLevel's own split is off."""
    return sequence("pretokenizers", [*map(split, patterns), _BYTE_LEVEL | {"use_regex": False}])


LLAMA_3_WORDS = _gpt_4_words(r"\p{N}{1,3}")
_UP_TO_3_DIGITS, _ONE_DIGIT = _splits(LLAMA_3_WORDS), _splits(_gpt_4_words(r"\p{N}"))
LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")  # they put BOS before a text and do not split a word that is a token
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {  # tokenizer.ggml.pre -> the pre-tokenizer of tokenizer.json
    "smollm": sequence("pretokenizers", [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]),
    **dict.fromkeys(LLAMA_3, _UP_TO_3_DIGITS),
    "smaug-bpe": _UP_TO_3_DIGITS,
    "dbrx": _UP_TO_3_DIGITS,  # OLMo 2
    "qwen2": _ONE_DIGIT,
    "deepseek-r1-qwen": _ONE_DIGIT,
    "gpt-2": _BYTE_LEVEL,
    "olmo": _BYTE_LEVEL,
    "default": _splits(
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ),
}


def byte_level_parts(vocab: dict[str, int], merges: list[list[str]], pre: str) -> dict[str, Any]:
    """The normalizer, pre-tokenizer, decoder and model of tokenizer.json; `pre` is a name in PRE_TOKENIZERS."""
    return {
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
        "model": bpe_model(vocab, merges, **({"ignore_merges": True} if pre in LLAMA_3 else {})),
    }
