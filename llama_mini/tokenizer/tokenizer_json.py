"""The content of tokenizer.json and tokenizer_config.json, for vocabularies that come in another format."""

from collections.abc import Sequence
from typing import Any

Token = tuple[str, int]  # content and id


def tokenizer_json(
    parts: dict[str, Any], added_tokens: list[dict[str, Any]], bos: Token | None, eos: Token | None = None
) -> dict[str, Any]:
    """`parts` are the normalizer, pre-tokenizer, decoder and model. `bos` goes before a text, `eos` after it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        **parts,
        "post_processor": _frame(bos, eos),
    }


def tokenizer_config(**settings: Any) -> dict[str, Any]:
    """Names the class that uses tokenizer.json as it is: LlamaTokenizer and GPT2Tokenizer replace parts of it."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}


def added_token(id: int, content: str, special: bool, rstrip: bool = False) -> dict[str, Any]:
    """A token that is looked for in a text before the model sees it; `rstrip`: with the white space after it."""
    rules = {"single_word": False, "lstrip": False, "rstrip": rstrip, "normalized": False}
    return {"id": id, "content": content, **rules, "special": special}


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


def sequence(kind: str, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Steps in a row; `kind` is "normalizers", "pretokenizers" or "decoders"."""
    return {"type": "Sequence", kind: list(steps)}


def _frame(bos: Token | None, eos: Token | None) -> dict[str, Any] | None:
    """The post-processor that puts tokens around a text; None for no tokens."""
    tokens = [token for token in (bos, eos) if token is not None]
    if not tokens:
        return None
    before, after = (
        [] if token is None else [{"SpecialToken": {"id": token[0], "type_id": 0}}] for token in (bos, eos)
    )
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, second, *after],
        "special_tokens": {content: {"id": content, "ids": [id], "tokens": [content]} for content, id in tokens},
    }
