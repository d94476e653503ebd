"""tokenizer.json, through the `tokenizers` library.

The file is used as it is, as in transformers' PreTrainedTokenizerFast. (transformers' LlamaTokenizer replaces parts of
the file with its own; no other reader does.)
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from llama_mini.errors import RequestError, TokenizerError
from llama_mini.tokenizer.backend import AddedTokens, Piece, encoding_of, is_control, native_failures_as, of_library
from llama_mini.tokenizer.config_files import AddedToken, ConfigFiles
from llama_mini.tokenizer.json_decoder import BYTE_TOKEN, respelled, token_reader
from llama_mini.tokenizer.tokenizer_json import bpe_model


class HuggingFaceJson:
    """A tokenizer.json whose control tokens are masked: they have random names, which no text can contain.

    Raw text and chats use one encoder, so a control token in a template keeps its exact rules (rstrip, Metaspace's
    "first" and so on).
    """

    names: Mapping[str, str] = MappingProxyType({})  # tokenizer_config.json has the names
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, spec: dict[str, Any], where: Path | str, files: ConfigFiles) -> None:
        """`spec`: content of the file; `where`: its name in messages. Raises TokenizerError for an unknown format."""
        try:
            vocab = _model_vocab(spec)
            added = _added_tokens(spec, vocab, files)
            masks = _masks(added)
            spec = spec | {part: respelled(spec.get(part)) for part in ("pre_tokenizer", "decoder")}
            self._bytes_of, self.strips_space = token_reader(spec)
            _check_frame(spec.get("post_processor"))
            masked = _masked(spec, vocab, added, masks)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"{where} is not a known form of tokenizer.json ({error!r}); restore it") from error
        except TokenizerError as error:
            raise TokenizerError(f"{where}: {error}") from error
        with native_failures_as(TokenizerError, f"reading {where}"):
            self._encoder = _encoder(masked)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        names = {token.content: masks.get(token.content, token.content) for token in added}
        ids = {content: id for content, name in names.items() if (id := self._encoder.token_to_id(name)) is not None}
        self._contents = {id: content for content, id in ids.items()}  # of added tokens; the library has the others
        self._added_ids = {id for content, id in ids.items() if content not in vocab}
        self.vocab_size = max([*vocab.values(), *self._contents], default=-1) + 1
        self.control_ids: Mapping[str, int] = {content: ids[content] for content in masks}
        self._mask_of = {ids[content]: mask for content, mask in masks.items()}
        self.special_ids = frozenset(ids[token.content] for token in added if token.special)
        self.added = AddedTokens(added, self._encoder.normalizer)
        self.frame = self._frame(where)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        text = "".join(self._mask_of[piece] if isinstance(piece, int) else piece for piece in pieces)
        with native_failures_as(RequestError, "encoding a text"):
            return encoding_of(self._encoder, text).ids

    def token_id(self, content: str) -> int | None:
        return self._encoder.token_to_id(self._mask_of.get(self.control_ids.get(content, -1), content))

    def token_bytes(self, token_id: int) -> bytes:
        content = self._contents.get(token_id) or self._encoder.id_to_token(token_id) or ""
        return content.encode() if token_id in self._added_ids else self._bytes_of(content)

    def _frame(self, where: Path | str) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        with native_failures_as(TokenizerError, f"the post-processor of {where}"):
            framed = self._encoder.encode("a")
        if outside := [id for id in framed.ids if id >= self.vocab_size]:
            raise TokenizerError(f"{where}: its post-processor adds token {outside[0]} of {self.vocab_size}")
        text = [i for i, added in enumerate(framed.special_tokens_mask) if not added] or [len(framed.ids)]
        return framed.ids[: text[0]], framed.ids[text[-1] + 1 :]


def _encoder(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer. Vocabulary and merges do not pass through JSON, which would take four times as long."""
    model = spec["model"]
    if model.get("type") != "BPE":
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    shell = tokenizers.Tokenizer.from_str(json.dumps(spec | {"model": model | {"vocab": {}, "merges": []}}))
    names = {*bpe_model({}, []), "ignore_merges"} - {"type"}
    settings = {name: value for name, value in model.items() if name in names and value is not None}
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(**settings))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(encoder, part, getattr(shell, part))
    encoder.add_tokens([of_library(AddedToken(**token)) for token in spec["added_tokens"]])
    return encoder


def _added_tokens(spec: dict[str, Any], vocab: Mapping[str, int], files: ConfigFiles) -> list[AddedToken]:
    """The file's added tokens, and those that only tokenizer_config.json adds or names as special."""
    added = {token["content"]: AddedToken(**token) for token in spec.get("added_tokens") or []}
    for token in files.added_tokens:
        known = added.setdefault(token.content, token)
        added[token.content] = replace(known, special=known.special or token.special)
    for content in files.names.values():
        if (content in added or content in vocab) and is_control(content, special=False):
            added[content] = replace(added.get(content, AddedToken(content=content)), special=True)
    # The bytes of byte_fallback are text, also where the file adds them as BpeTrainer(special_tokens=...) does.
    has_bytes = spec["model"].get("byte_fallback")
    return [t for t in added.values() if not (has_bytes and t.content in vocab and BYTE_TOKEN.fullmatch(t.content))]


def _model_vocab(spec: dict[str, Any]) -> dict[str, int]:
    """The tokens of the model itself. Unigram models list pairs of piece and score; the position is the id."""
    vocab = spec["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece: id for id, (piece, _) in enumerate(vocab)}
    if wrong := set(map(type, ids.values())) - {int}:
        raise TokenizerError(f"its vocabulary has an id that is a {wrong.pop().__name__}, not a whole number")
    return ids


def _masks(added: list[AddedToken]) -> dict[str, str]:
    """Control token -> a name that nobody can guess. It is drawn at random for each load, and never shown.

    Its ends are letters of a word where those of the token are: the single_word of a neighbour depends on them.
    """
    key = secrets.token_hex(16)
    contents = [token.content for token in added if is_control(token.content, token.special)]
    return {text: f"{_end(text[:1])}{key}.{index}.{_end(text[-1:])}" for index, text in enumerate(contents)}


def _end(char: str) -> str:
    return "0" if re.match(r"\w", char) else "\ue000"


def _masked(
    spec: dict[str, Any], vocab: Mapping[str, int], added: list[AddedToken], masks: dict[str, str]
) -> dict[str, Any]:
    """The same tokenizer, with its control tokens renamed wherever the library matches text."""
    model = dict(spec["model"])
    in_vocab = masks.keys() & vocab.keys()
    if isinstance(model["vocab"], dict):
        model["vocab"] = {**vocab, **{masks[content]: vocab[content] for content in in_vocab}}
        for content in in_vocab:
            del model["vocab"][content]
    else:
        model["vocab"] = [[masks.get(content, content), score] for content, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = _without(in_vocab, _pairs(model["merges"]))
    if model.get("unk_token") is not None:
        model["unk_token"] = masks.get(model["unk_token"], model["unk_token"])
    tokens = [asdict(token) | {"content": masks.get(token.content, token.content)} for token in added]
    for token in tokens:  # the library requires a number, but numbers tokens by their position
        token["id"] = 0 if token["id"] is None else token["id"]
    return spec | {"model": model, "added_tokens": tokens}


def _check_frame(processor: Any) -> None:
    """Refuses a template with special tokens that the file does not list: the library would panic."""
    for step in [processor, *((processor or {}).get("processors") or ())]:
        if step and step["type"] == "TemplateProcessing":
            named = {item["SpecialToken"]["id"] for item in [*step["single"], *step["pair"]] if "SpecialToken" in item}
            if absent := sorted(named - set(step["special_tokens"])):
                raise TokenizerError(f"its post-processor uses the token {absent[0]!r:.80}, which it does not list")


def _pairs(merges: list[Any]) -> list[tuple[str, ...]]:
    """Merges as pairs. Older files have lines, "left right", and comments that begin with #version."""
    kinds = set(map(type, merges))
    if kinds <= {list}:
        return list(map(tuple, merges))
    if kinds == {str}:
        return [tuple(line.split(" ")) for line in merges if not line.startswith("#version")]
    raise TokenizerError("its merges are neither pairs of tokens nor lines of two")


def _without(tokens: Collection[str], merges: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The merges without those of a control token: otherwise `</s>` could be merged from its letters."""
    if not tokens:
        return merges
    unsafe = set(tokens)
    if unsafe.isdisjoint(map("".join, merges)) and unsafe.isdisjoint(chain.from_iterable(merges)):
        return merges
    return [merge for merge in merges if unsafe.isdisjoint((*merge, "".join(merge)))]
