"""A byte-level BPE vocabulary of a GGUF file in the form of tokenizer.json, and how a text is split into words for it.

The splits are those of llama.cpp (src/llama-vocab.cpp), which names them in tokenizer.ggml.pre.
"""

from typing import Any

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _splits(*patterns: str) -> dict[str, Any]:
    """Each pattern splits in turn what the one before left; byte-level's own split is off."""
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, _BYTE_LEVEL | {"use_regex": False}]}


def _words(number: str) -> dict[str, Any]:
    """The split of GPT-4, whose heirs differ in how many digits make a word."""
    letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return _splits(f"{letters}|{number}|{others}")


_UP_TO_3_DIGITS, _ONE_DIGIT = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")  # these put BOS before a text, and keep a word whole that is a token
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {  # tokenizer.ggml.pre -> the pre-tokenizer of tokenizer.json
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
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
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **({"ignore_merges": True} if pre in LLAMA_3 else {}),
            "vocab": vocab,
            "merges": merges,
        },
    }
