"""The vocabulary inside a GGUF file, as the content of tokenizer.json, tokenizer_config.json and chat templates.

Two kinds are read: byte-level BPE (gpt2) and SentencePiece (llama). A key, or its absence, means what
it means to llama.cpp (src/llama-vocab.cpp).
"""

import re
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.special_ids import END_TOKENS, gguf_token_id
from llama_mini.errors import TokenizerError, errors_about, warn
from llama_mini.tokenizer.config_files import AddedToken, ConfigFiles
from llama_mini.tokenizer.pre_tokenizers import ADD_BOS, IGNORE_MERGES, PRE_TOKENIZERS
from llama_mini.tokenizer.tokenizer_json import (
    BYTE_TOKENS,
    PieceType,
    Token,
    byte_level_parts,
    merges_by_score,
    sentencepiece_parts,
    tokenizer_config,
    tokenizer_json,
)
from llama_mini.validate import check_flag, join_names, short_repr

# Types that become added tokens: matched before the BPE model sees the text, or never matched by text.
_ADDED = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNUSED)
# Phi-3's other tokens take the white space after them. GGUF does not state it; llama.cpp goes by the model's name.
_KEPT_SPACE = ("<unk>", "<s>", "<|endoftext|>")
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# SentencePiece's ids of tokens for which the file states none.
_USUAL_IDS = {"unknown": (0, PieceType.UNKNOWN), "bos": (1, PieceType.CONTROL), "eos": (2, PieceType.CONTROL)}


class GGUFVocabulary:
    """The `tokenizer.` metadata of a GGUF file.

    Every member raises TokenizerError for a key with a wrong value, and names the key, the value and what can be read.
    """

    def __init__(self, header: GGUFHeader) -> None:
        self.path = header.path
        self._metadata = header.metadata
        model = self._get("model")
        if not isinstance(model, str) or model not in ("gpt2", "llama"):
            known = "gpt2, byte-level BPE, and llama, SentencePiece"
            raise self._fault("model", f"is {short_repr(model)}; only {known}, can be read")
        self.is_sentencepiece = model == "llama"
        if self.is_sentencepiece and np.size(self._get("precompiled_charsmap", ())):
            raise self._fault("precompiled_charsmap", "changes characters before the lookup; this is not supported")

    @property
    def kind(self) -> str:
        """A description for people, such as "GGUF byte-level BPE (llama-bpe)"."""
        return "GGUF SentencePiece" if self.is_sentencepiece else f"GGUF byte-level BPE ({self._pre})"

    @property
    def chat_templates(self) -> dict[str, str]:
        """Templates by name: tokenizer.chat_template is the default one, tokenizer.chat_template.tool_use another."""
        prefix = "tokenizer.chat_template"
        texts = {key: text for key, text in self._metadata.items() if f"{key}.".startswith(f"{prefix}.")}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise TokenizerError(f"{self.path}: {key} must be text, not {short_repr(text)}")
        return {key[len(prefix) + 1 :] or "default": text for key, text in texts.items()}

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends a text, eos_token_id first: those that the file states, and the tokens of END_TOKENS."""
        stated = (self._token_id(name) for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
        return list(dict.fromkeys([*(id for id in stated if id is not None), *self._ends.values()]))

    def tokenizer_json(self) -> dict[str, Any]:
        """The content of tokenizer.json: the vocabulary, merges and added tokens of the file."""
        parts = self._sentencepiece_parts() if self.is_sentencepiece else self._byte_level_parts()
        is_phi_3 = re.search("phi-?3", str(self._metadata.get("general.name")), re.IGNORECASE) is not None
        added = [
            AddedToken(
                id=id,
                content=self._tokens[id],
                special=type_ != PieceType.USER_DEFINED,
                rstrip=is_phi_3 and self._tokens[id] not in _KEPT_SPACE,
            )
            for id, type_ in enumerate(self._types)
            if type_ in _ADDED
        ]
        return tokenizer_json(parts, added, self._added("bos"), self._added("eos"))

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        architecture = self._metadata.get("general.architecture", "llama")
        return tokenizer_config(
            add_bos_token=self._adds("bos"),
            **({"add_eos_token": True} if self._adds("eos") else {}),
            **({} if self.is_sentencepiece else {"add_prefix_space": False}),
            model_max_length=self._metadata.get(f"{architecture}.context_length"),
            **(dict.fromkeys(_NAMED) | self._names()),
        )

    def config_files(self, n_rows: int) -> ConfigFiles:
        """The same facts as `read_config_files` gives; the embedding has `n_rows` rows."""
        return ConfigFiles(
            hugging_face=True,
            names=self._names(),
            chat_templates=self.chat_templates,
            eos_ids=tuple(self.eos_ids),
            model_vocab_size=n_rows,
        )

    def _names(self) -> dict[str, str]:
        ids = {name: self._token_id(key) for name, key in _NAMED.items()}
        return {name: self._tokens[id] for name, id in ids.items() if id is not None}

    def _byte_level_parts(self) -> dict[str, Any]:
        if self._get("pre") is None:
            default = "llama.cpp's default, which may not be what the model was trained with"
            warn(f"{self.path} has no tokenizer.ggml.pre: text is split by {default}; convert the model again")
        splits, ignore_merges = PRE_TOKENIZERS[self._pre], self._pre in IGNORE_MERGES
        return byte_level_parts(self._vocab, self._merges(), splits, ignore_merges)

    def _merges(self) -> list[list[str]]:
        vocab = self._vocab
        merges = [line.split(" ") for line in self._texts("merges")]  # byte-level tokens write a space as Ġ
        if set(map(len, merges)) <= {2} and vocab.keys() >= {*chain.from_iterable(merges), *map("".join, merges)}:
            return merges
        wrong = next(m for m in merges if len(m) != 2 or not vocab.keys() >= {*m, "".join(m)})
        problem = "which is not two tokens with a space between that make a third"
        raise self._fault("merges", f"holds {short_repr(' '.join(wrong))}, {problem}")

    def _sentencepiece_parts(self) -> dict[str, Any]:
        unknown = self._token_id("unknown")
        if unknown is None and not set(BYTE_TOKENS) <= self._vocab.keys():
            raise self._fault("tokens", "lacks some of the 256 byte tokens, and there is no unknown_token_id instead")
        scores = self._scores()
        ordinary = [id for id, type_ in enumerate(self._types) if type_ == PieceType.NORMAL]
        ranks = [scores[id] for id in ordinary if len(self._tokens[id]) > 1]
        if n_equal := len(ranks) - len(set(ranks)):  # llama.cpp joins the leftmost first; a list of merges cannot
            order = "of pieces with equal scores, the first in the vocabulary is joined first"
            warn(f"{self.path}: tokenizer.ggml.scores has {n_equal} repeated scores; {order}; convert the model again")
        return sentencepiece_parts(
            self._vocab,
            merges_by_score(self._tokens, scores, ordinary),
            None if unknown is None else self._tokens[unknown],
            adds_space=self._flag("add_space_prefix", True),
            squeezes_spaces=self._flag("remove_extra_whitespaces"),
        )

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def _fault(self, key: str, sentence: str) -> TokenizerError:
        line = sentence.replace("\n", " ")  # NumPy prints an array on several lines
        return TokenizerError(f"{self.path}: tokenizer.ggml.{key} {line}")

    def _flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        check_flag(f"{self.path}: tokenizer.ggml.{key}", value, TokenizerError)
        return value

    def _adds(self, name: str) -> bool:
        """Whether the token named "bos" or "eos" goes around a text."""
        return self._flag(f"add_{name}_token", name == "bos" and (self.is_sentencepiece or self._pre in ADD_BOS))

    def _added(self, name: str) -> Token | None:
        if not self._adds(name):
            return None
        if (id := self._token_id(name)) is None:
            raise self._fault(f"add_{name}_token", f"is true or absent, but there is no {name}_token_id")
        return self._tokens[id], id

    def _texts(self, key: str) -> list[str]:
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value[:1]):  # an array has one type
            raise self._fault(key, "is missing" if value is None else "must be an array of strings")
        return value

    @cached_property
    def _tokens(self) -> list[str]:
        tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(self._texts("tokens"))]
        if not tokens:
            raise self._fault("tokens", "is empty")
        if self.is_sentencepiece:  # user-defined pieces are matched before spaces become ▁
            for id in (id for id, type_ in enumerate(self._types) if type_ == PieceType.USER_DEFINED):
                tokens[id] = tokens[id].replace("▁", " ")
        return tokens

    @cached_property
    def _types(self) -> list[int]:
        types = self._numbers("token_type", "iu", np.full(len(self._texts("tokens")), PieceType.NORMAL))
        if unknown := set(types.tolist()) - set(range(PieceType.NORMAL, PieceType.BYTE + 1)):
            raise self._fault("token_type", f"holds {min(unknown)}; {PieceType.NORMAL} to {PieceType.BYTE} are known")
        corrected = types.tolist()
        if wrong := [text for text, id in self._ends.items() if corrected[id] != PieceType.CONTROL]:
            names = join_names(wrong)  # llama.cpp corrects them too
            warn(f"{self.path}: tokenizer.ggml.token_type does not mark {names} as control; read as if it did")
        for text in wrong:
            corrected[self._ends[text]] = PieceType.CONTROL
        return corrected

    @cached_property
    def _ends(self) -> dict[str, int]:
        """Text -> id of the tokens of END_TOKENS."""
        ends = {text: id for id, text in enumerate(self._texts("tokens")) if text in END_TOKENS}
        if ends.keys() >= {"<|return|>", "<|call|>"}:
            ends.pop("<|end|>", None)  # gpt-oss writes it after its thoughts, before the answer
        return ends

    @cached_property
    def _vocab(self) -> dict[str, int]:
        vocab = dict(zip(self._tokens, range(len(self._tokens)), strict=True))
        if len(vocab) != len(self._tokens):
            repeated = next(token for id, token in enumerate(self._tokens) if vocab[token] != id)
            raise self._fault("tokens", f"holds {short_repr(repeated)} twice")
        return vocab

    def _scores(self) -> list[float]:
        if self._get("scores") is None:
            raise self._fault("scores", "is missing; SentencePiece joins pieces by score")
        scores = self._numbers("scores", "fiu")
        if not np.isfinite(scores).all():
            raise self._fault("scores", f"holds {scores[~np.isfinite(scores)][0]}; every score must be finite")
        return scores.tolist()

    def _numbers(self, key: str, kinds: str, default: Any = None) -> np.ndarray:
        numbers, n_tokens = self._get(key, default), len(self._texts("tokens"))
        if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in kinds or len(numbers) != n_tokens:
            raise self._fault(key, f"must be an array of {n_tokens} numbers, one for each token")
        return numbers

    def _token_id(self, name: str) -> int | None:
        n_tokens = len(self._tokens)
        with errors_about(self.path):
            id = gguf_token_id(self._metadata, name, n_tokens, self.path, TokenizerError)
        usual, type_ = _USUAL_IDS.get(name, (0, 0))
        return usual if id is None and self.is_sentencepiece and self._types[usual : usual + 1] == [type_] else id

    @property
    def _pre(self) -> str:
        name = self._get("pre", "default")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise self._fault("pre", f"is {short_repr(name)}, an unknown pre-tokenizer; known: {known}")
        return name
