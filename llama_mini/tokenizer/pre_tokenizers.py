"""How byte-level BPE splits a text into words, under the names that GGUF files give in tokenizer.ggml.pre.

The splits are those of llama.cpp (src/llama-vocab.cpp and src/unicode.cpp), for files of the architectures that open
here and for those that share a split with one. Where llama.cpp differs from what a model was trained with, they follow
llama.cpp: upper case is all but a-z, lower case all but A-Z.
"""

from typing import Any

from llama_mini.tokenizer.tokenizer_json import split

_SUFFIX = r"'(?:[sStTmMdD]|[rRvV][eE]|[lL][lL])"  # of an English word: it's, I'LL
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"
_GPT_2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_SYMBOLS}|{_SPACES}"
_GPT_4 = rf"{_SYMBOLS}[\r\n]*|{_LINES}"
_LLAMA_3 = rf"{_SUFFIX}|{_PREFIX}\p{{L}}+|\p{{N}}{{1,3}}|{_GPT_4}"
_QWEN_2 = rf"{_SUFFIX}|{_PREFIX}\p{{L}}+|\p{{N}}|{_GPT_4}"
_GPT_4O = rf"{_SYMBOLS}[\r\n/]*|{_LINES}"
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"  # letters outside ASCII are both
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_KANJI_AND_KANA = "[一-龥\u3040-\u30ff]+"
_AFTER_ASCII_SYMBOL = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_3 = (
    rf"{_AFTER_ASCII_SYMBOL}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
)
# No white space is in the next ranges and lists: outside ASCII, it matches nothing but `\s` in llama.cpp.
_DEEPSEEK_CJK = "[一-龥\u0800-一가-\ud7ff&&[^\\s]]+"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇ"
    "Ꞌ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
# Digits in threes, counted from the right. Each look-ahead happens once a number, which keeps the time linear.
_THREES = split(r"(?<!\p{N})\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\p{N}{3}", "MergedWithPrevious")
_ASCII_THREES = (
    split(r"(?<![0-9])[0-9]{1,2}(?=(?:[0-9]{3})+(?![0-9]))", "MergedWithPrevious"),
    split(r"[0-9]{3}", "MergedWithNext"),
)

_LLAMA_3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
ADD_BOS = frozenset({*_LLAMA_3_NAMES, "tekken"})  # a text begins with BOS unless the file says otherwise
IGNORE_MERGES = frozenset({*_LLAMA_3_NAMES, "tekken", "glm4", "glm5", "minicpm5"})  # a word may be a token
_TABLE: tuple[tuple[Any, ...], ...] = (  # names; then patterns, each of which splits what the ones before it left
    ("gpt-2 phi-2 olmo mpt jais mellum exaone4 a.x-4.0 gigachat trillion granite-docling", _GPT_2),
    ("smollm command-r starcoder refact codeshell exaone minerva-7b mellum2", r"\p{N}", _GPT_2),
    (" ".join([*_LLAMA_3_NAMES, "smaug-bpe", "dbrx", "chatglm-bpe", "glm4", "glm5"]), _LLAMA_3),
    ("qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan kormo f2llmv2 solar-open grok-2 bailingmoe bailingmoe2", _QWEN_2),
    ("qwen35", rf"{_SUFFIX}|{_PREFIX}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"),
    ("tekken", rf"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*|\p{{N}}|{_GPT_4O}"),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        rf"{_PREFIX}{_UPPER}*{_LOWER}+(?:{_SUFFIX})?|{_PREFIX}{_UPPER}+{_LOWER}*(?:{_SUFFIX})?|\p{{N}}{{1,3}}|{_GPT_4O}",
    ),
    (
        "deepseek-llm",
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟、-。]+",
        r"(?<!\s)\s+\z",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    ),
    ("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", r"\p{N}{1,3}", _KANJI_AND_KANA, _DEEPSEEK_3),
    ("seed-coder", rf"{_SUFFIX}|{_PREFIX}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"),
    ("tiny_aya cohere2moe", _THREES, rf"{_PREFIX}[\p{{L}}\p{{M}}]+(?:{_SUFFIX})?|\p{{N}}{{1,3}}|{_GPT_4O}"),
    ("superbpe", r"\p{N}+", *_ASCII_THREES),
    ("minicpm5", r"\p{N}{1,3}", rf"{_SUFFIX}|{_PREFIX}\p{{L}}+|\p{{N}}+|{_GPT_4}"),
    ("ufakzeka", rf"{_PREFIX}\p{{L}}+|\p{{N}}|{_GPT_4}"),
    (
        "jais-2",
        rf"{_SUFFIX}|{_PREFIX}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|"
        + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
        + r"\s",
    ),
    ("bloom poro-chat gpt3-finnish", _BLOOM),
    ("viking", _BLOOM, r"\p{N}"),
    ("falcon", r"[\p{P}\$\+<=>\^~\|`]+", _GPT_2, r"[0-9][0-9][0-9]"),
    ("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", r"[0-9][0-9][0-9]"),
)
PRE_TOKENIZERS: dict[str, tuple[Any, ...]] = {name: tuple(steps) for names, *steps in _TABLE for name in names.split()}
