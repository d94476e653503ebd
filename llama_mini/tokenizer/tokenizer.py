"""Text to token ids and back, for the vocabularies of the LLaMA family."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_mini.checkpoint.gguf.header import GGUFHeader, read_header
from llama_mini.checkpoint.hf.hub import resolve
from llama_mini.checkpoint.io.file_kind import FileKind, file_kind
from llama_mini.checkpoint.io.files import VOCABULARIES, exists, inside
from llama_mini.errors import RequestError, TokenizerError, warn
from llama_mini.tokenizer.backend import Backend, check_text, split
from llama_mini.tokenizer.chat import template_pieces
from llama_mini.tokenizer.config_files import ConfigFiles, read_bytes, read_config_files, read_json
from llama_mini.tokenizer.gguf_vocabulary import GGUFVocabulary
from llama_mini.tokenizer.hf_json import HuggingFaceJson
from llama_mini.tokenizer.messages import checked_messages, checked_variables
from llama_mini.tokenizer.sandbox import read_by
from llama_mini.tokenizer.sentencepiece_file import SentencePieceFile
from llama_mini.tokenizer.tekken_file import TekkenFile, is_tekken
from llama_mini.tokenizer.templates import Templates, check_variables
from llama_mini.tokenizer.tiktoken_file import LLAMA_3_TEMPLATE, TiktokenFile
from llama_mini.tokenizer.transformers_names import TransformersNames
from llama_mini.validate import check_flag, short_repr

if TYPE_CHECKING:  # it imports torch, which a tokenizer does not need
    from llama_mini.checkpoint.source import Source


class Tokenizer(TransformersNames):
    """One tokenizer for every vocabulary of the LLaMA family. Use `from_pretrained`.

    Text never becomes a special token, neither in `encode` nor in chats, unless `parse_special` asks for it.

    bos_id: the id that begins a text, or None: from tokenizer_config.json, else the vocabulary, else
        generation_config.json, else config.json.
    eos_ids: all ids that end a text: those where transformers' generate stops (generation_config.json, or else
        config.json), the eos_token of tokenizer_config.json (in many chat models the end of a turn), and those of the
        vocabulary (LLaMA 3's end_of_text, eom and eot). A GGUF model stops where it stops in llama.cpp.
    eos_id: the eos_token that the checkpoint names, one of `eos_ids`; None if it names none.
    control_ids: those of special tokens, and of words that look like markers: a user's message never becomes them.
    strips_space: whether decoding drops the space at the start of a text that encoding added (SentencePiece).
    vocab_size: the highest id of the vocabulary plus one; a model may have more rows.
    kind: a description for people: "tokenizer.json", "tekken.json", "tiktoken", "SentencePiece", "GGUF SentencePiece".

    Named tokens have transformers' names too: `eos_token`, `eos_token_id`, `pad_token_id`, ...; None if absent.
    """

    def __init__(self, backend: Backend, files: ConfigFiles, kind: str) -> None:
        self._backend = backend
        self.kind = kind
        self._names = {**backend.names, **files.names}
        templates = files.chat_templates
        if isinstance(backend, TiktokenFile) and not (files.hugging_face or templates):
            # A Meta directory does not say whether its model was trained to chat; the vocabulary has the tokens for it.
            templates = {"default": LLAMA_3_TEMPLATE}
        self._templates = Templates(templates)
        self.chat_template = templates.get("default")  # the text of the checkpoint's template; None if it has none
        self.vocab_size = backend.vocab_size
        self._model_vocab_size = max(files.model_vocab_size, backend.vocab_size)
        self.strips_space, self.control_ids = backend.strips_space, frozenset(backend.control_ids.values())
        bos, self.eos_id = self._named_id("bos_token"), self._named_id("eos_token")
        self.bos_id = bos if bos is not None else next(iter(backend.frame[0]), files.bos_id)
        named = [] if self.eos_id is None else [self.eos_id]
        self.eos_ids = backend.eos_ids | frozenset(files.eos_ids) | frozenset(named)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Open a directory (Hugging Face's or Meta's), a vocabulary file in one, a GGUF file or a hub name.

        The content of a vocabulary decides its kind. In a directory, tokenizer.json comes before the others.
        Raises TokenizerError if there is none or it is broken, CheckpointError if a file or repository is unreadable.
        """
        path = resolve(path, tokenizer_only=True)
        candidates = [inside(path, name) for name in VOCABULARIES] if path.is_dir() else [path]
        vocabulary = next((candidate for candidate in candidates if exists(candidate)), None)
        if vocabulary is None:
            do = "give a checkpoint's directory or a vocabulary file"
            if exists(path / "merges.txt"):
                do = "make one of vocab.json and merges.txt with transformers' AutoTokenizer and save_pretrained"
            raise TokenizerError(f"no tokenizer found: looked for {' and '.join(map(str, candidates))}; {do}")
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
        add_eos_token say. Added tokens that are not special are words of the vocabulary, as in the tokenizers library.
        With `parse_special`, the names of special tokens in the text become these tokens: only for text that a chat
        template made, never for a user's. Raises RequestError for no string or half a surrogate pair.
        """
        check_text(text)
        found = self._backend.added.find(text, parse_special)
        ids = self._backend.encode(split(text, found, self._backend.control_ids))
        before, after = self._backend.frame
        return [*before, *ids, *after] if add_special_tokens else ids

    def decode(self, ids: Iterable[int] | int, skip_special_tokens: bool = True) -> str:
        """The text of ids: a list, a one-dimensional array or tensor, or a single id.

        Invalid UTF-8 becomes U+FFFD; spaces stay as they are. `skip_special_tokens` leaves out the tokens that the
        checkpoint marks as special; `<think>` is seldom one.
        """
        with suppress(TypeError):
            ids = [operator.index(ids)]  # type: ignore[arg-type]
        if not isinstance(ids, Iterable):
            raise RequestError(f"ids is {short_repr(ids)}, expected a list of token ids")
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

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Text -> id of the tokens that decoding leaves out, the longest text first."""
        ids = {text: id for text, id in self._backend.control_ids.items() if text and id in self._backend.special_ids}
        return {text: ids[text] for text in sorted(ids, key=len, reverse=True)}

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works. Always for Meta's LLaMA 3 files, which are the same for a base model."""
        return self.chat_template is not None

    @property
    def template_variables(self) -> frozenset[str]:
        """What `apply_chat_template` takes for the template, such as `tools` or `enable_thinking`."""
        return self._templates.all_variables()

    def choose_template(self, tools: bool) -> str:
        """The text of the template that renders a chat with tools or without. Raises TokenizerError without one."""
        return self._templates.choose(None, tools)

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a chat, by the checkpoint's template; a Meta directory of LLaMA 3 has that of Meta's own code.

        messages: mappings, dataclasses or pydantic models, with the keys that transformers and OpenAI's API have. An
            assistant's turn may have `tool_calls` without content; content may be a list of text parts.
        add_generation_prompt: end where the assistant's answer begins.
        continue_final_message: end inside the last message instead, so that the model continues it.
        chat_template: another template, or the name of one in the checkpoint. With `tools`, "tool_use" is used if it
            exists, else "default".
        variables: `tools` (JSON schemas), `documents`, and whatever else the template reads (`template_variables`),
            as keywords or in vLLM's `chat_template_kwargs`. None is not given. Control strings in them stay text.

        If the checkpoint's rule adds a BOS, there is exactly one, whether the template writes it or not.
        Raises RequestError for malformed messages and for a variable that the template does not read, TokenizerError if
        there is no template or it fails.
        """
        check_flag("add_generation_prompt", add_generation_prompt, RequestError)
        check_flag("continue_final_message", continue_final_message, RequestError)
        given = checked_variables(variables)
        template = self._templates.choose(chat_template, "tools" in given)
        if given:
            check_variables(given, self._templates.variables(template))
        given["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        checked = checked_messages(messages, template, read_by(template)[1])
        pieces = template_pieces(template, checked, given, self._names, self._backend, continue_final_message)
        ids = self._backend.encode(pieces)
        before, _ = self._backend.frame
        return ids if ids[: len(before)] == before else [*before, *ids]

    def _named_id(self, name: str) -> int | None:
        content = self._names.get(name)
        if content is None:
            return None
        id = self._backend.token_id(content)
        if id is None:
            warn(f"tokenizer_config.json has the {name} {content!r}, which the vocabulary does not hold; ignored")
        return id


def _open(path: Path, files: ConfigFiles) -> tuple[str, Backend]:
    """The kind of a vocabulary file, by its content, and its backend."""
    kind = file_kind(path)
    if kind in (FileKind.EMPTY, FileKind.LFS_POINTER, FileKind.HTML, FileKind.PICKLE, FileKind.ARCHIVE):
        raise TokenizerError(f"{path} is not a tokenizer but {kind.value}")
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


def open_tokenizer(source: "Source") -> Tokenizer:
    """The tokenizer of a checkpoint. Raises TokenizerError also if the embedding has no row for an ordinary token."""
    if source.tokenizer is not None:
        tokenizer = Tokenizer.from_pretrained(source.tokenizer)
        with suppress(TokenizerError):  # a text also ends where it does in the adapter's model, as in transformers
            tokenizer.eos_ids |= open_tokenizer(replace(source, tokenizer=None)).eos_ids
    else:
        tokenizer = Tokenizer.from_gguf(source.gguf) if source.gguf else Tokenizer.from_pretrained(source.directory)
    rows = source.config.vocab_size
    if tokenizer.vocab_size > rows:
        problem = f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding has {rows} rows"
        special = tokenizer.control_ids
        if tokenizer.vocab_size - rows > len(special) or not special.issuperset(range(rows, tokenizer.vocab_size)):
            raise TokenizerError(f"{problem}; they belong to different checkpoints")
        warn(f"{problem}: the added tokens from {rows} on cannot be used")
    return tokenizer
