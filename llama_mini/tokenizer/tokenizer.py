"""Text to token ids and back, for the vocabularies of the LLaMA family."""

import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_mini.checkpoint.gguf.header import GGUFHeader, read_header
from llama_mini.checkpoint.hf.hub import fetch_from_hub, is_hub_name
from llama_mini.checkpoint.io.file_kind import FileKind, describe, file_kind
from llama_mini.checkpoint.io.files import VOCABULARIES, exists, inside
from llama_mini.errors import LlamaMiniWarning, RequestError, TokenizerError
from llama_mini.tokenizer import chat
from llama_mini.tokenizer.backend import Backend, Piece, any_of
from llama_mini.tokenizer.config_files import ConfigFiles, read_bytes, read_config_files, read_json
from llama_mini.tokenizer.gguf_vocabulary import GGUFVocabulary
from llama_mini.tokenizer.hf_json import HuggingFaceJson
from llama_mini.tokenizer.sentencepiece_file import SentencePieceFile
from llama_mini.tokenizer.tekken_file import TekkenFile, is_tekken
from llama_mini.tokenizer.tiktoken_file import TiktokenFile

if TYPE_CHECKING:  # it imports torch, which a tokenizer does not need
    from llama_mini.checkpoint.source import Source


class Tokenizer:
    """One tokenizer for every vocabulary of the LLaMA family. Use `from_pretrained`.

    Text never becomes a control token, neither in `encode` nor in chats, unless `parse_special` asks for it.

    bos_id: the id that begins a text, or None: from tokenizer_config.json, else the vocabulary, else
        generation_config.json, else config.json.
    eos_ids: all ids that end a text: those where transformers' generate stops (generation_config.json, or else
        config.json), the eos_token of tokenizer_config.json (in many chat models the end of a turn), and those of the
        vocabulary (LLaMA 3's end_of_text, eom and eot).
    vocab_size: the highest id of the vocabulary plus one; a model may have more rows.
    kind: a description for people: "tokenizer.json", "tekken.json", "tiktoken", "SentencePiece", "GGUF SentencePiece".
    """

    def __init__(self, backend: Backend, files: ConfigFiles, kind: str) -> None:
        self._backend = backend
        self.kind = kind
        self._names = {**backend.names, **files.names}
        self._chat_template = files.chat_template
        # A Meta directory does not say whether its model was trained to chat; the vocabulary has the tokens for it.
        self._llama_3_dialogue = isinstance(backend, TiktokenFile) and not files.hugging_face
        self.vocab_size = backend.vocab_size
        self._model_vocab_size = max(files.model_vocab_size, backend.vocab_size)
        bos, self._eos_id = self._named_id("bos_token"), self._named_id("eos_token")
        self.bos_id = bos if bos is not None else next(iter(backend.frame[0]), files.bos_id)
        named = [] if self._eos_id is None else [self._eos_id]
        self.eos_ids = backend.eos_ids | frozenset(files.eos_ids) | frozenset(named)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Open a directory (Hugging Face's or Meta's), a vocabulary file in one, a GGUF file or a hub name.

        The content of a vocabulary decides its kind. In a directory, tokenizer.json comes before the others.
        Raises TokenizerError if there is none or it is broken, CheckpointError if a file or repository is unreadable.
        """
        path = _fetched(path)
        candidates = [inside(path, name) for name in VOCABULARIES] if path.is_dir() else [path]
        vocabulary = next((candidate for candidate in candidates if candidate.is_file()), None)
        if vocabulary is None:
            raise TokenizerError(
                f"no tokenizer found: looked for {' and '.join(map(str, candidates))}; "
                + (
                    "make one of vocab.json and merges.txt with transformers' AutoTokenizer.from_pretrained and "
                    "save_pretrained"
                    if exists(path / "merges.txt")
                    else "give a checkpoint's directory or a vocabulary file"
                )
            )
        if file_kind(vocabulary) is FileKind.GGUF:
            return cls.from_gguf(read_header(vocabulary))
        files = read_config_files(vocabulary.parent)
        kind, backend = _open(vocabulary, files)
        return cls(backend, files, kind)

    @classmethod
    def from_gguf(cls, header: GGUFHeader) -> "Tokenizer":
        """The tokenizer in a GGUF file, from its header. Raises TokenizerError for wrong metadata."""
        vocabulary, embedding = GGUFVocabulary(header), header.tensors.get("token_embd.weight")
        files = vocabulary.config_files(embedding.shape[0] if embedding else 0)
        backend = HuggingFaceJson(vocabulary.tokenizer_json(), f"the tokenizer in {header.path}", files)
        return cls(backend, files, vocabulary.kind)

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text. With `add_special_tokens`, also what the checkpoint's own rule puts around it, often a BOS.

        The rule is the post-processor of tokenizer.json; for tokenizer.model it is BOS, or what add_bos_token and
        add_eos_token say. With `parse_special`, control strings in the text become control tokens: only for text that a
        chat template made, never for a user's. Raises RequestError for no string or half a surrogate pair.
        """
        _check_text(text)
        pieces: list[Piece] = [text]
        if parse_special:
            control_ids = self._backend.control_ids
            parts = re.split(f"({any_of(control_ids)})", text)
            pieces = [control_ids[part] if i % 2 else part for i, part in enumerate(parts) if part]
        ids = self._backend.encode(pieces)
        before, after = self._backend.frame
        return [*before, *ids, *after] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. Invalid UTF-8 becomes U+FFFD; spaces stay as they are.

        `skip_special_tokens` leaves out the tokens that the checkpoint marks as special; `<think>` is seldom one.
        """
        text = b"".join(self.token_bytes(id, skip_special_tokens) for id in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_space else text

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes that one token adds to a text, perhaps a part of a character.

        Empty for an id of the model that the vocabulary does not have: vocabularies are padded to round sizes, and a
        model may sample such an id. Raises RequestError for an id that the model does not have.
        """
        try:
            id = operator.index(token_id)
        except TypeError as error:
            raise RequestError(f"token id {token_id!r} is a {type(token_id).__name__}, expected an integer") from error
        if not 0 <= id < self._model_vocab_size:
            raise RequestError(f"token id {id} is outside the vocabulary; expected 0 to {self._model_vocab_size - 1}")
        if id >= self.vocab_size or (skip_special_tokens and id in self._backend.special_ids):
            return b""
        return self._backend.token_bytes(id)

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that a chat template may write and text never becomes."""
        return frozenset(self._backend.control_ids.values())

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Text -> id of the tokens that decoding leaves out, the longest text first."""
        ids = {text: id for text, id in self._backend.control_ids.items() if text and id in self._backend.special_ids}
        return {text: ids[text] for text in sorted(ids, key=len, reverse=True)}

    @property
    def strips_space(self) -> bool:
        """Whether decoding drops the space at the start of a text that encoding added (SentencePiece)."""
        return self._backend.strips_space

    @property
    def eos_id(self) -> int | None:
        """The eos_token that the checkpoint names, one of `eos_ids`; None when it names none."""
        return self._eos_id

    @property
    def chat_template(self) -> str | None:
        """The text of the checkpoint's template; None when it has none."""
        return self._chat_template

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works. Always for Meta's LLaMA 3 files, which are the same for a base model."""
        return self._chat_template is not None or self._llama_3_dialogue

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a chat, by the checkpoint's template, or in LLaMA 3's dialogue format for a Meta directory.

        If the checkpoint's rule adds a BOS, there is exactly one, whether the template writes it or not.
        Raises RequestError for malformed messages, TokenizerError if there is no template or it fails.
        """
        checked = chat.checked_messages(messages)
        if self._chat_template is not None:
            pieces = chat.template_pieces(
                self._chat_template, checked, self._names, self._backend, add_generation_prompt
            )
        elif self._llama_3_dialogue:
            pieces = chat.llama_3_pieces(checked, self._backend.control_ids, add_generation_prompt)
        else:
            raise TokenizerError("this checkpoint has no chat template; complete raw text instead (--raw)")
        for piece in pieces:
            if isinstance(piece, str):
                _check_text(piece)
        ids = self._backend.encode(pieces)
        before, _ = self._backend.frame
        return ids if ids[: len(before)] == before else [*before, *ids]

    def _named_id(self, name: str) -> int | None:
        content = self._names.get(name)
        if content is None:
            return None
        id = self._backend.token_id(content)
        if id is None:
            warnings.warn(
                f"tokenizer_config.json has the {name} {content!r}, which the vocabulary does not hold; ignored",
                LlamaMiniWarning,
                stacklevel=4,
            )
        return id


def _fetched(name: str | Path) -> Path:
    """The path if it exists, else the tokenizer files of a hub name, in the standard cache."""
    path = Path(name)
    return path if exists(path) or isinstance(name, Path) or not is_hub_name(name) else fetch_from_hub(name, True)


def _open(path: Path, files: ConfigFiles) -> tuple[str, Backend]:
    """The kind of a vocabulary file, by its content, and its backend."""
    kind = file_kind(path)
    if kind in (FileKind.EMPTY, FileKind.LFS_POINTER, FileKind.HTML, FileKind.PICKLE, FileKind.ZIP):
        raise TokenizerError(f"{path} is not a tokenizer but {describe(kind)}")
    if kind is FileKind.JSON:
        spec = read_json(path)
        if is_tekken(spec):
            return "tekken.json", TekkenFile(spec, path)
        return "tokenizer.json", HuggingFaceJson(spec, path, files)
    data = read_bytes(path)
    reasons = []
    for name, opened in (
        ("tiktoken", lambda: TiktokenFile(data)),
        ("SentencePiece", lambda: SentencePieceFile(path, data, files)),
    ):
        try:
            return name, opened()
        except ValueError as error:
            reasons.append(f"as {name}: {error}")
    raise TokenizerError(f"{path} is not a tokenizer: {'; '.join(reasons)}; expected one of these, or a tokenizer.json")


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"a text is a {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a text holds half a surrogate pair, {text[error.start]!r}, at character {error.start}; remove it"
        ) from error


def open_tokenizer(source: "Source") -> Tokenizer:
    """The tokenizer of a checkpoint. Raises TokenizerError also if the embedding has no row for an ordinary token."""
    tokenizer = Tokenizer.from_gguf(source.gguf) if source.gguf else Tokenizer.from_pretrained(source.directory)
    rows = source.config.vocab_size
    if tokenizer.vocab_size > rows:
        problem = f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding has {rows} rows"
        special = tokenizer.control_ids
        if tokenizer.vocab_size - rows > len(special) or not special.issuperset(range(rows, tokenizer.vocab_size)):
            raise TokenizerError(f"{problem}; they belong to different checkpoints")
        warnings.warn(f"{problem}: the special tokens from {rows} on cannot be used", LlamaMiniWarning, stacklevel=3)
    return tokenizer
