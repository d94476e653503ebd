"""Meta's tokenizer.model (tiktoken or SentencePiece) as the tokenizer files of a Hugging Face directory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.backend import any_of, is_control
from llama_mini.tokenizer.config_files import AddedToken
from llama_mini.tokenizer.sentencepiece_file import Model, read_model
from llama_mini.tokenizer.tiktoken_file import LLAMA_3_TEMPLATE, LLAMA_3_WORDS, N_SPECIAL, TiktokenFile
from llama_mini.tokenizer.tokenizer_json import (
    BYTE_LETTERS,
    PieceType,
    byte_level_parts,
    merges_by_score,
    sentencepiece_parts,
    split,
    tokenizer_config,
    tokenizer_json,
)

Files = dict[str, dict[str, Any] | str | Path]

_BPE = 2  # TrainerSpec.ModelType


def meta_tokenizer_files(path: Path) -> Files:
    """File name -> its content: a JSON object, a text, or the path of a file to copy.

    The content of `path` decides its kind. Raises TokenizerError if it is neither kind, or a SentencePiece model that
    tokenizer.json cannot express.
    """
    kind = Tokenizer.from_pretrained(path).kind
    if kind == "tiktoken":
        return _tiktoken_files(TiktokenFile(path.read_bytes()))
    if kind == "SentencePiece":
        return _sentencepiece_files(path, path.read_bytes())
    raise TokenizerError(f"{path} is a {kind}, expected tiktoken's or SentencePiece's format; rename the file")


def _tiktoken_files(vocabulary: TiktokenFile) -> Files:
    tokens = [vocabulary.token_bytes(rank) for rank in range(vocabulary.vocab_size - N_SPECIAL)]
    contents = ["".join(BYTE_LETTERS[byte] for byte in token) for token in tokens]
    vocab = {content: rank for rank, content in enumerate(contents)}
    merges = [[contents[left], contents[right]] for left, right in _merges_by_rank(tokens)]
    parts = byte_level_parts(vocab, merges, [LLAMA_3_WORDS], ignore_merges=True)
    added = [AddedToken(id=id, content=content, special=True) for content, id in vocabulary.control_ids.items()]
    (bos_id,), _ = vocabulary.frame
    return {
        "tokenizer.json": tokenizer_json(parts, added, bos=(vocabulary.names["bos_token"], bos_id)),
        "tokenizer_config.json": tokenizer_config(**vocabulary.names),
        "generation_config.json": {"bos_token_id": bos_id, "eos_token_id": sorted(vocabulary.eos_ids)},
        "chat_template.jinja": LLAMA_3_TEMPLATE,
    }


def _merges_by_rank(tokens: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Every way to cut a token into two others, as ranks, in the order of the token's rank.

    tiktoken joins any two neighbours that make a token, even one of a higher rank than the token it becomes a part of,
    so one pair for each token is not enough.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tqdm(tokens, "ranks to merges", unit="token", delay=1, leave=False, disable=None):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        yield from sorted((ranks[left], ranks[right]) for left, right in halves if left in ranks and right in ranks)


def _sentencepiece_files(path: Path, data: bytes) -> Files:
    model = read_model(data)
    if fault := _inexpressible(model):
        raise TokenizerError(f"{path} {fault}, which tokenizer.json cannot express; run the Meta directory as it is")
    processor = SentencePieceProcessor(model_proto=data)
    pieces = [piece.content for piece in model.pieces]
    ids_of = lambda *kinds: [id for id, piece in enumerate(model.pieces) if piece.kind in kinds]  # noqa: E731
    scores = [processor.get_score(id) for id in range(len(pieces))]
    named = {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
    named = {name: id for name, id in named.items() if id >= 0}
    if "unk" not in named:
        raise TokenizerError(f"{path} has no unknown piece, which tokenizer.json needs; restore the file")
    defined = ids_of(PieceType.USER_DEFINED)
    markers = {id for id in defined if is_control(pieces[id], special=False)}
    words = [pieces[id] for id in defined if id not in markers]
    # The library matches added tokens before spaces become ▁.
    contents = [piece.replace("▁", " ") if id in markers else piece for id, piece in enumerate(pieces)]
    parts = sentencepiece_parts(
        {content: id for id, content in enumerate(contents)},
        merges_by_score(pieces, scores, ids_of(PieceType.NORMAL)),
        contents[named["unk"]],
        adds_space=bool(model.normalizer.get(3, True)),
        squeezes_spaces=bool(model.normalizer.get(4, True)),
    )
    special = set(ids_of(PieceType.UNKNOWN, PieceType.CONTROL))
    added = [AddedToken(id=id, content=contents[id], special=id in special) for id in sorted(special | markers)]
    bos = (contents[named["bos"]], named["bos"]) if "bos" in named else None
    return {
        "tokenizer.json": tokenizer_json(_keeping_whole(parts, words) if words else parts, added, bos),
        "tokenizer_config.json": tokenizer_config(
            **{f"{name}_token": contents[id] for name, id in named.items()}, add_bos_token=bos is not None
        ),
        "generation_config.json": {f"{name}_token_id": id for name, id in named.items() if name != "unk"},
        "tokenizer.model": path,
    }


def _inexpressible(model: Model) -> str | None:
    """What the model does that merges by score cannot do. (transformers loads such a file, but gives other ids.)"""
    if model.trainer.get(3) != _BPE:
        return "is a SentencePiece model of another type than BPE"
    if model.normalizer.get(2):
        return "changes characters before they are looked up (precompiled_charsmap)"
    if not model.normalizer.get(5, True):
        return "keeps spaces as they are (escape_whitespaces)"
    return "has unused pieces" if any(piece.kind == PieceType.UNUSED for piece in model.pieces) else None


def _keeping_whole(parts: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """User-defined pieces that are ordinary text: split off before the merges, the longest first.

    As added tokens, they would put a space before the text that follows them.
    """
    return parts | {"pre_tokenizer": split(any_of(words)), "model": parts["model"] | {"ignore_merges": True}}
