"""The tokenizer inside a GGUF file, as the content of tokenizer.json, tokenizer_config.json and chat_template.jinja.

Two kinds are read: byte-level BPE (gpt2) and SentencePiece (llama). What a key means, and what it means where it is
absent, is what llama.cpp makes of it (src/llama-vocab.cpp).
"""

import warnings
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.errors import LlamaMiniWarning, TokenizerError
from llama_mini.tokenizer.gguf_byte_level import LLAMA_3, PRE_TOKENIZERS, byte_level_parts
from llama_mini.tokenizer.gguf_sentencepiece import BYTE_TOKENS, merges_by_score, sentencepiece_parts
from llama_mini.validate import short_repr

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)
_TOKEN_TYPES = range(1, 7)  # the last is a byte
_ADDED = (_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED)  # matched before the model, or never by text
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_USUAL_IDS = {"unknown": (0, _UNKNOWN), "bos": (1, _CONTROL), "eos": (2, _CONTROL)}  # SentencePiece, where not stated
_ENDS = (
    *("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),  # LLaMA 3's
    *("<|im_end|>", "<|endoftext|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>"),  # chat formats'
)


def tokenizer_json(header: GGUFHeader) -> dict[str, Any]:
    """The content of tokenizer.json: the vocabulary, merges and added tokens of the file.

    Raises TokenizerError that names the metadata key, what it holds and what can be read.
    """
    metadata = _Metadata(header)
    parts = _sentencepiece(metadata) if metadata.is_sentencepiece else _byte_level(metadata)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _post_processor(metadata),
        "decoder": parts["decoder"],
        "model": parts["model"],
    }


def tokenizer_config(header: GGUFHeader) -> dict[str, Any]:
    """The content of tokenizer_config.json. Raises TokenizerError as above."""
    metadata = _Metadata(header)
    architecture = header.metadata.get("general.architecture", "llama")
    return {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would put its own pre-tokenizer in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata.adds("bos"),
        **({"add_eos_token": True} if metadata.adds("eos") else {}),
        **({} if metadata.is_sentencepiece else {"add_prefix_space": False}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.metadata.get(f"{architecture}.context_length"),
        **dict.fromkeys(_NAMED),
        **metadata.names(),
    }


def chat_template(header: GGUFHeader) -> str | None:
    """The chat template, if the file has one. Raises TokenizerError if it is not text."""
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{header.path}: tokenizer.chat_template must be text, not {short_repr(template)}")
    return template


def special_eos_ids(header: GGUFHeader) -> list[int]:
    """Every id that ends a text, the file's eos_token_id first. Raises TokenizerError as above.

    The others are its eot_token_id and eom_token_id, and those control tokens that are known by their names to end a
    text or a turn: many files state none but the first.
    """
    metadata = _Metadata(header)
    stated = (metadata.token_id(name) for name in ("eos", "eot", "eom"))
    ends = (metadata.vocab.get(name) for name in _ENDS)
    known = (id for id in ends if id is not None and metadata.types[id] == _CONTROL)
    return list(dict.fromkeys([*(id for id in stated if id is not None), *known]))


def kind(header: GGUFHeader) -> str:
    """A phrase for people, such as "GGUF byte-level BPE (llama-bpe)". Raises TokenizerError as above."""
    metadata = _Metadata(header)
    return "GGUF SentencePiece" if metadata.is_sentencepiece else f"GGUF byte-level BPE ({metadata.pre})"


def _byte_level(metadata: "_Metadata") -> dict[str, Any]:
    if metadata.get("pre") is None:
        message = (
            f"{metadata.path} has no tokenizer.ggml.pre: its text is split by llama.cpp's default, which may not be "
            "what the model was trained with; convert the model again"
        )
        warnings.warn(message, LlamaMiniWarning, stacklevel=4)
    return byte_level_parts(metadata.vocab, _merges(metadata), metadata.pre)


def _merges(metadata: "_Metadata") -> list[list[str]]:
    lines = metadata.texts("merges")
    merges = [line.split(" ") for line in lines]  # byte-level tokens hold no space: it is written Ġ
    if set(map(len, merges)) <= {2} and metadata.vocab.keys() >= {*chain.from_iterable(merges), *map("".join, merges)}:
        return merges
    for line, merge in zip(lines, merges, strict=True):
        if len(merge) != 2 or "" in merge:
            raise metadata.fault("merges", f"holds {short_repr(line)}, which is not two tokens with a space between")
        for token in (*merge, "".join(merge)):
            if token not in metadata.vocab:
                raise metadata.fault(
                    "merges", f"holds {short_repr(line)}, but {short_repr(token)} is not in the vocabulary"
                )
    return merges


def _sentencepiece(metadata: "_Metadata") -> dict[str, Any]:
    unknown = metadata.token_id("unknown")
    if unknown is None and not set(BYTE_TOKENS) <= metadata.vocab.keys():
        raise metadata.fault("tokens", "lacks some of the 256 byte tokens, and there is no unknown_token_id instead")
    scores = metadata.scores()
    ordinary = [id for id, type_ in enumerate(metadata.types) if type_ == _NORMAL]
    ranks = [scores[id] for id in ordinary if len(metadata.tokens[id]) > 1]
    if equal := len(ranks) - len(set(ranks)):  # the one further left would go first, which no list of merges can say
        message = (
            f"{metadata.path}: tokenizer.ggml.scores gives {equal} pieces a score that another has too; where the two "
            "compete, the first in the vocabulary goes first; convert the model again"
        )
        warnings.warn(message, LlamaMiniWarning, stacklevel=4)
    return sentencepiece_parts(
        metadata.vocab,
        merges_by_score(metadata.tokens, scores, ordinary),
        None if unknown is None else metadata.tokens[unknown],
        adds_space=metadata.flag("add_space_prefix", True),
        squeezes_spaces=metadata.flag("remove_extra_whitespaces"),
    )


def _added_tokens(metadata: "_Metadata") -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": id, "content": metadata.tokens[id], **plain, "special": type_ != _USER_DEFINED}
        for id, type_ in enumerate(metadata.types)
        if type_ in _ADDED
    ]


def _post_processor(metadata: "_Metadata") -> dict[str, Any] | None:
    """What puts BOS before a text and EOS after it; None where the file asks for neither."""
    frame: dict[str, list[dict[str, Any]]] = {"bos": [], "eos": []}
    special_tokens = {}
    for name in filter(metadata.adds, frame):
        if (id := metadata.token_id(name)) is None:
            raise metadata.fault(f"add_{name}_token", f"is true or absent, but there is no {name}_token_id")
        token = metadata.tokens[id]
        frame[name].append({"SpecialToken": {"id": token, "type_id": 0}})
        special_tokens[token] = {"id": token, "ids": [id], "tokens": [token]}
    if not special_tokens:
        return None
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [*frame["bos"], text, *frame["eos"]],
        "pair": [*frame["bos"], text, second, *frame["eos"]],
        "special_tokens": special_tokens,
    }


class _Metadata:
    """The `tokenizer.ggml.` keys, each checked for what it must hold."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self.values = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.ggml.")}
        model = self.get("model")
        if not isinstance(model, str) or model not in ("gpt2", "llama"):
            known = "gpt2, byte-level BPE, and llama, SentencePiece"
            raise self.fault("model", f"is {short_repr(model)}; only {known}, can be read")
        self.is_sentencepiece = model == "llama"
        if self.is_sentencepiece and np.size(self.get("precompiled_charsmap", ())):
            raise self.fault("precompiled_charsmap", "changes characters before they are looked up; it is not known")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"tokenizer.ggml.{key}", default)

    def fault(self, key: str, sentence: str) -> TokenizerError:
        line = sentence.replace("\n", " ")  # NumPy prints an array on several
        return TokenizerError(f"{self.path}: tokenizer.ggml.{key} {line}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, f"must be true or false, not {short_repr(value)}")
        return value

    def adds(self, name: str) -> bool:
        """Whether the token named "bos" or "eos" goes around a text."""
        by_default = name == "bos" and (self.is_sentencepiece or self.pre in LLAMA_3)
        return self.flag(f"add_{name}_token", by_default)

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value[:1]):  # the others are alike
            raise self.fault(key, "is missing" if value is None else "must be an array of strings")
        return value

    @cached_property
    def tokens(self) -> list[str]:
        tokens = list(self.texts("tokens"))
        for id in (id for id, token in enumerate(tokens) if not token):
            tokens[id] = f"[EMPTY_{id}]"
        if not tokens:
            raise self.fault("tokens", "is empty")
        if self.is_sentencepiece:  # a user-defined piece is looked for in the text, whose spaces are not yet written ▁
            for id in (id for id, type_ in enumerate(self.types) if type_ == _USER_DEFINED):
                tokens[id] = tokens[id].replace("▁", " ")
        return tokens

    @cached_property
    def types(self) -> list[int]:
        n_tokens = len(self.texts("tokens"))
        types = self.get("token_type", np.full(n_tokens, _NORMAL))
        if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != n_tokens:
            raise self.fault("token_type", f"must be an array of {n_tokens} numbers, one for each token")
        if strange := set(types.tolist()) - set(_TOKEN_TYPES):
            raise self.fault("token_type", f"holds {min(strange)}; 1 to 6 are known")
        return types.tolist()

    @cached_property
    def vocab(self) -> dict[str, int]:
        vocab = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        if len(vocab) != len(self.tokens):
            twice = next(token for id, token in enumerate(self.tokens) if vocab[token] != id)
            raise self.fault("tokens", f"holds {short_repr(twice)} twice")
        return vocab

    def scores(self) -> list[float]:
        scores = self.get("scores")
        if scores is None:
            raise self.fault("scores", "is missing; SentencePiece joins pieces by them")
        if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "fiu" or len(scores) != len(self.tokens):
            raise self.fault("scores", f"must be an array of {len(self.tokens)} numbers, one for each token")
        if not np.isfinite(scores).all():
            raise self.fault("scores", f"holds {scores[~np.isfinite(scores)][0]}; every score must be finite")
        return scores.tolist()

    def token_id(self, name: str) -> int | None:
        value = self.get(f"{name}_token_id")
        if value is None:
            usual, type_ = _USUAL_IDS.get(name, (0, 0))
            return usual if self.is_sentencepiece and self.types[usual : usual + 1] == [type_] else None
        if type(value) is int and 0 <= value < len(self.tokens):
            return value
        problem = f"must be a token from 0 to {len(self.tokens) - 1}, not {short_repr(value)}"
        if type(value) is not int or name not in ("padding", "unknown"):
            raise self.fault(f"{name}_token_id", problem)
        warnings.warn(f"{self.fault(f'{name}_token_id', problem)}; ignored", LlamaMiniWarning, stacklevel=4)
        return None

    def names(self) -> dict[str, str]:
        """The named special tokens that the file has: "bos_token" -> "<s>"."""
        ids = {name: self.token_id(key) for name, key in _NAMED.items()}
        return {name: self.tokens[id] for name, id in ids.items() if id is not None}

    @property
    def pre(self) -> str:
        name = self.get("pre", "default")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            raise self.fault(
                "pre", f"is {short_repr(name)}, an unknown pre-tokenizer; known: {', '.join(PRE_TOKENIZERS)}"
            )
        return name
