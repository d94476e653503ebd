"""A SentencePiece tokenizer.model: LLaMA 1 and 2, TinyLlama.

The library matches user-defined pieces such as `<|im_start|>` in text. So the file, a protobuf message
(sentencepiece_model.proto), is first read here, and the type of such pieces is changed to control.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer.backend import AddedTokens, Piece, encode_each, is_control, native_failures_as
from llama_mini.tokenizer.config_files import AddedToken, ConfigFiles
from llama_mini.tokenizer.tokenizer_json import PieceType

_VARINT = re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]")  # a number of protobuf


class SentencePieceFile:
    """A SentencePiece vocabulary, with the control tokens that a Hugging Face directory adds to it."""

    def __init__(self, path: Path, data: bytes, files: ConfigFiles) -> None:
        """Raises ValueError if `data` is not such a file, TokenizerError if an added token is not supported."""
        model = read_model(data)
        pieces = model.pieces
        # Encoding adds a space before a text (add_dummy_prefix) or drops spaces there (remove_extra_whitespaces).
        self.strips_space = bool(model.normalizer.get(3, True) or model.normalizer.get(4, True))
        added = {token.id: token for token in files.added_tokens if token.id is not None}
        self._contents = dict(enumerate(piece.content for piece in pieces))
        self._contents |= {id: token.content for id, token in added.items()}
        self._byte_ids = {id for id, piece in enumerate(pieces) if piece.kind == PieceType.BYTE}
        special, control = set(), set()
        for id, content in self._contents.items():
            kind = pieces[id].kind if id < len(pieces) else PieceType.USER_DEFINED
            marker = is_control(content, special=False)
            named = marker and content in files.names.values()
            if kind in (PieceType.UNKNOWN, PieceType.CONTROL) or named or (id in added and added[id].special):
                special.add(id)
            if id in special or (marker and (kind == PieceType.USER_DEFINED or id in added)):
                control.add(id)
            elif id >= len(pieces):
                why = "which cannot be added to a SentencePiece file; convert the tokenizer to tokenizer.json"
                raise TokenizerError(f"{path}: the added token {content!r} ({id}) is ordinary text, {why}")
        with native_failures_as(ValueError, "sentencepiece"):
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=_write_model(model, control))
        self.vocab_size = max(self._contents) + 1
        self.control_ids: Mapping[str, int] = {self._contents[id]: id for id in control}
        self.special_ids = frozenset(special)
        self.added = AddedTokens(
            replace(added.get(id, AddedToken(content=content)), special=id in special)
            for content, id in self.control_ids.items()
        )
        ids = {"bos_token": self._processor.bos_id(), "eos_token": self._processor.eos_id()}
        ids = {key: id for key, id in ids.items() if id >= 0}
        self.names: Mapping[str, str] = {key: self._contents[id] for key, id in ids.items()}
        self.eos_ids = frozenset(id for key, id in ids.items() if key == "eos_token")
        before = [ids["bos_token"]] if "bos_token" in ids and files.add_bos is not False else []
        self.frame = (before, list(self.eos_ids) if files.add_eos else [])

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Each text gets the model's leading space, also after a control token, as in Meta's dialogues."""
        return encode_each(pieces, self._processor.encode)

    def token_id(self, content: str) -> int | None:
        return next((id for id, known in self._contents.items() if known == content), None)

    def token_bytes(self, token_id: int) -> bytes:
        content = self._contents.get(token_id, "")
        return bytes.fromhex(content[3:5]) if token_id in self._byte_ids else content.replace("▁", " ").encode()


@dataclass(frozen=True)
class ModelPiece:
    content: str
    kind: int
    message: bytes


@dataclass(frozen=True)
class Model:
    """A ModelProto. `trainer` and `normalizer` are the fields of its specs, by number; `rest` is all but the pieces."""

    pieces: list[ModelPiece]
    trainer: dict[int, int | bytes]
    normalizer: dict[int, int | bytes]
    rest: bytes


def read_model(data: bytes) -> Model:
    """Raises ValueError if `data` is not a SentencePiece model, or one that is not supported."""
    pieces: list[ModelPiece] = []
    rest = bytearray()
    specs: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}}
    for number, value, raw in _fields(data):
        parts = {}
        if number in (1, *specs) and isinstance(value, bytes):
            parts = {part: content for part, content, _ in _fields(value)}
        if number == 1 and isinstance(value, bytes):
            content = parts.get(1)
            if not isinstance(content, bytes) or not content:
                raise ValueError(f"piece {len(pieces)} has no text")
            pieces.append(ModelPiece(content.decode(), int(parts.get(3, PieceType.NORMAL)), value))
        else:
            rest += raw
            specs.get(number, {}).update(parts)
    if not pieces:
        raise ValueError("it holds no pieces")
    if specs[2].get(24):
        raise ValueError("it writes spaces after words (treat_whitespace_as_suffix), which is not supported")
    return Model(pieces, specs[2], specs[3], bytes(rest))


def _write_model(model: Model, control: set[int]) -> bytes:
    """The file, with some pieces made control tokens: a type is appended, and of two equal fields the last counts."""
    messages = (
        piece.message
        + (bytes([3 << 3, PieceType.CONTROL]) if id in control and piece.kind != PieceType.UNKNOWN else b"")
        for id, piece in enumerate(model.pieces)
    )
    return b"".join(bytes([1 << 3 | 2]) + _varint_bytes(len(message)) + message for message in messages) + model.rest


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """The fields of a protobuf message: number, value, and the bytes of the whole field."""
    position = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        value: int | bytes
        if key < 8 or key & 7 not in (0, 1, 2, 5):
            raise ValueError(f"byte {start} does not start a protobuf field")
        if key & 7 == 0:
            value, position = _varint(data, position)
        else:
            length, position = _varint(data, position) if key & 7 == 2 else (8 if key & 7 == 1 else 4, position)
            value, position = data[position : position + length], position + length
        if position > len(data):
            raise ValueError("a protobuf field ends beyond the file")
        yield key >> 3, value, data[start:position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    if position < len(data) and data[position] < 0x80:  # nearly all
        return data[position], position + 1
    if (match := _VARINT.match(data, position)) is None:
        raise ValueError("a protobuf number does not end")
    return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(match[0])), match.end()


def _varint_bytes(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _varint_bytes(value >> 7)
