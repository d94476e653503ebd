"""The tokenizer inside a GGUF file, as the content of tokenizer.json, tokenizer_config.json and chat_template.jinja."""

from typing import Any

import numpy as np

from llama_mini.checkpoint.gguf_file import GGUFHeader, shown
from llama_mini.errors import TokenizerError

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {  # tokenizer.ggml.pre -> the pre-tokenizer of tokenizer.json
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_TOKEN_TYPES = range(1, 7)  # the others: unknown, unused, byte
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_json(header: GGUFHeader) -> dict[str, Any]:
    """The content of tokenizer.json: byte-level BPE with the vocabulary, merges and control tokens of the file.

    Raises TokenizerError that names the metadata key, what it holds and what can be read.
    """
    metadata = _Metadata(header)
    tokens = metadata.tokens()
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise metadata.fault("tokens", f"holds {shown(twice)} twice")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": None,
        "pre_tokenizer": metadata.pre_tokenizer(),
        "post_processor": _post_processor(metadata, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": _merges(metadata, vocab),
        },
    }


def tokenizer_config(header: GGUFHeader) -> dict[str, Any]:
    """The content of tokenizer_config.json. Raises TokenizerError as above."""
    metadata = _Metadata(header)
    tokens = metadata.tokens()
    named = {name: metadata.token_id(gguf, tokens) for name, gguf in _NAMED.items()}
    return {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would put its own pre-tokenizer in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata.flag("add_bos_token"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.metadata.get("llama.context_length"),
        **{name: None if i is None else tokens[i] for name, i in named.items()},
    }


def chat_template(header: GGUFHeader) -> str | None:
    """The chat template, if the file has one. Raises TokenizerError if it is not text."""
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{header.path}: tokenizer.chat_template must be text, not {shown(template)}")
    return template


def _added_tokens(metadata: "_Metadata", tokens: list[str]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], **plain, "special": kind == _CONTROL}
        for i, kind in enumerate(metadata.token_types(len(tokens)))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _merges(metadata: "_Metadata", vocab: dict[str, int]) -> list[list[str]]:
    merges = []
    for line in metadata.texts("merges"):
        left, space, right = line.partition(" ")  # byte-level tokens hold no space: it is written Ġ
        if not space or not left or not right or " " in right:
            raise metadata.fault("merges", f"holds {shown(line)}, which is not two tokens with a space between")
        for token in (left, right, left + right):
            if token not in vocab:
                raise metadata.fault("merges", f"holds {shown(line)}, but {shown(token)} is not in the vocabulary")
        merges.append([left, right])
    return merges


def _post_processor(metadata: "_Metadata", tokens: list[str]) -> dict[str, Any] | None:
    """What puts BOS before a text; None where the file asks for none, as byte-level files without the key do."""
    if metadata.flag("add_eos_token"):
        raise metadata.fault("add_eos_token", "is true; an end token after every text is not implemented")
    if not metadata.flag("add_bos_token"):
        return None
    bos = metadata.token_id("bos", tokens)
    if bos is None:
        raise metadata.fault("add_bos_token", "is true, but there is no bos_token_id")
    first: dict[str, Any] = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }


class _Metadata:
    """The `tokenizer.ggml.` keys, each checked for what it must hold."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self.values = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.ggml.")}
        if (model := self.get("model")) != "gpt2":
            raise self.fault("model", f"is {shown(model)}; only gpt2, byte-level BPE, can be read")
        if self.flag("add_space_prefix"):
            raise self.fault("add_space_prefix", "is true, which byte-level BPE does not have")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"tokenizer.ggml.{key}", default)

    def fault(self, key: str, sentence: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: tokenizer.ggml.{key} {sentence}")

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.fault(key, f"must be true or false, not {shown(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.fault(key, "is missing" if value is None else "must be an array of strings")
        return value

    def tokens(self) -> list[str]:
        tokens = self.texts("tokens")
        if not tokens:
            raise self.fault("tokens", "is empty")
        return tokens

    def token_types(self, n_tokens: int) -> list[int]:
        types = self.get("token_type", np.full(n_tokens, _NORMAL))
        if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != n_tokens:
            raise self.fault("token_type", f"must be an array of {n_tokens} numbers, one for each token")
        if strange := set(types.tolist()) - set(_TOKEN_TYPES):
            raise self.fault("token_type", f"holds {min(strange)}; 1 to 6 are known")
        return types.tolist()

    def token_id(self, name: str, tokens: list[str]) -> int | None:
        value = self.get(f"{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
            raise self.fault(f"{name}_token_id", f"must be a token from 0 to {len(tokens) - 1}, not {shown(value)}")
        return value

    def pre_tokenizer(self) -> dict[str, Any]:
        name = self.get("pre", "default")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            raise self.fault("pre", f"is {shown(name)}, an unknown pre-tokenizer; known: {', '.join(PRE_TOKENIZERS)}")
        return PRE_TOKENIZERS[name]
