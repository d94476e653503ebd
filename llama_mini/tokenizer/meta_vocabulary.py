"""Meta's tokenizer.model, tiktoken's or SentencePiece's, as the tokenizer files of a Hugging Face directory."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.backend import is_control
from llama_mini.tokenizer.gguf_byte_level import byte_level_parts
from llama_mini.tokenizer.gguf_sentencepiece import merges_by_score, sentencepiece_parts
from llama_mini.tokenizer.sentencepiece_file import CONTROL, UNKNOWN, USER_DEFINED, protobuf_fields
from llama_mini.tokenizer.tiktoken_file import N_SPECIAL, TiktokenFile

Files = dict[str, dict[str, Any] | str | Path]

# Meta's code encodes a content apart from the line breaks before it, which no template can: the ids differ where a
# content itself begins with a line break. The text is the same.
LLAMA_3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_NORMAL, _UNUSED = 1, 5  # SentencePiece.Type, as those imported
_BPE = 2  # TrainerSpec.ModelType


def meta_tokenizer_files(path: Path) -> Files:
    """Name -> a JSON object, a text, or the path of a file to copy. What kind `path` is, is told by its content.

    Raises TokenizerError when it is neither kind, or a SentencePiece model that tokenizer.json cannot express.
    """
    kind = Tokenizer.from_pretrained(path).kind
    if kind == "tiktoken":
        return _tiktoken_files(TiktokenFile(path, path.read_bytes()))
    if kind == "SentencePiece":
        return _sentencepiece_files(path, path.read_bytes())
    raise TokenizerError(f"{path} is a {kind}, expected tiktoken's or SentencePiece's format; give it its own name")


def _tiktoken_files(vocabulary: TiktokenFile) -> Files:
    tokens = [vocabulary.token_bytes(rank) for rank in range(vocabulary.vocab_size - N_SPECIAL)]
    letters = _byte_letters()
    contents = ["".join(letters[byte] for byte in token) for token in tokens]
    vocab = {content: rank for rank, content in enumerate(contents)}
    merges = [[contents[left], contents[right]] for left, right in _merges_by_rank(tokens)]
    parts = byte_level_parts(vocab, merges, "llama-bpe")
    added = [_added_token(id, content, special=True) for content, id in vocabulary.control_ids.items()]
    (bos_id,), _ = vocabulary.frame
    return {
        "tokenizer.json": _tokenizer_json(parts, added, (vocabulary.names["bos_token"], bos_id)),
        "tokenizer_config.json": _tokenizer_config(vocabulary.names),
        "generation_config.json": {"bos_token_id": bos_id, "eos_token_id": sorted(vocabulary.eos_ids)},
        "chat_template.jinja": LLAMA_3_TEMPLATE,
    }


def _merges_by_rank(tokens: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Every way to cut a token into two others, as ranks, in the order of the token's rank.

    tiktoken joins whatever two neighbours are a token together, also one that ranks higher than what it becomes a part
    of: the last pair that makes each token is not enough.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tqdm(tokens, "ranks to merges", unit="token", delay=1, leave=False, disable=None):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        yield from sorted((ranks[left], ranks[right]) for left, right in halves if left in ranks and right in ranks)


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable Latin-1 as it is; for the other 68, in order, those from U+0100."""
    alphabet = sorted(ByteLevel.alphabet())
    others = iter(alphabet[188:])
    return [letter if (letter := chr(byte)) in alphabet[:188] else next(others) for byte in range(256)]


def _sentencepiece_files(path: Path, data: bytes) -> Files:
    types, trainer, normalizer = _read_model(data)
    if fault := _inexpressible(types, trainer, normalizer):
        raise TokenizerError(f"{path} {fault}, which tokenizer.json cannot express; run the Meta directory as it is")
    processor = SentencePieceProcessor(model_proto=data)
    pieces = [processor.id_to_piece(id) for id in range(len(types))]
    scores = [processor.get_score(id) for id in range(len(types))]
    named = {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
    named = {name: id for name, id in named.items() if id >= 0}
    if "unk" not in named:
        raise TokenizerError(f"{path} has no unknown piece, which tokenizer.json needs; restore the file")
    defined = [id for id, type_ in enumerate(types) if type_ == USER_DEFINED]
    markers = {id for id in defined if is_control(pieces[id], special=False)}
    words = [pieces[id] for id in defined if id not in markers]
    # An added token is looked for in the text, whose spaces are not yet written ▁.
    contents = [piece.replace("▁", " ") if id in markers else piece for id, piece in enumerate(pieces)]
    parts = sentencepiece_parts(
        {content: id for id, content in enumerate(contents)},
        merges_by_score(pieces, scores, [id for id, type_ in enumerate(types) if type_ == _NORMAL]),
        contents[named["unk"]],
        adds_space=bool(normalizer.get(3, True)),
        squeezes_spaces=bool(normalizer.get(4, True)),
    )
    special = {id for id, type_ in enumerate(types) if type_ in (UNKNOWN, CONTROL)}
    added = [_added_token(id, contents[id], special=id in special) for id in sorted(special | markers)]
    bos = (contents[named["bos"]], named["bos"]) if "bos" in named else None
    return {
        "tokenizer.json": _tokenizer_json(_keeping_whole(parts, words) if words else parts, added, bos),
        "tokenizer_config.json": {
            **_tokenizer_config({f"{name}_token": contents[id] for name, id in named.items()}),
            "add_bos_token": bos is not None,
        },
        "generation_config.json": {f"{name}_token_id": id for name, id in named.items() if name != "unk"},
        "tokenizer.model": path,
    }


def _read_model(data: bytes) -> tuple[list[int], dict[int, Any], dict[int, Any]]:
    """The types of the pieces, and the fields of TrainerSpec and NormalizerSpec, by their numbers in ModelProto."""
    types = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, message, _ in protobuf_fields(data):
        if number in (1, *specs) and isinstance(message, bytes):
            fields = {part: content for part, content, _ in protobuf_fields(message)}
            if number == 1:
                types.append(int(fields.get(3, _NORMAL)))
            else:
                specs[number] |= fields
    return types, specs[2], specs[3]


def _inexpressible(types: Sequence[int], trainer: Mapping[int, Any], normalizer: Mapping[int, Any]) -> str | None:
    """What the model does that merges by score do not; transformers does not load such a tokenizer.model rightly."""
    if trainer.get(3) != _BPE:
        return "is a SentencePiece model of another type than BPE"
    if normalizer.get(2):
        return "changes characters before they are looked up (precompiled_charsmap)"
    if not normalizer.get(5, True):
        return "keeps spaces as they are (escape_whitespaces)"
    return "has unused pieces" if _UNUSED in types else None


def _keeping_whole(parts: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """User-defined pieces that are ordinary text: cut out before the merges, the longest first, and taken as they are.

    As added tokens they would put a space in front of the text behind them.
    """
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return parts | {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "model": parts["model"] | {"ignore_merges": True},
    }


def _tokenizer_json(parts: dict[str, Any], added: list[dict[str, Any]], bos: tuple[str, int] | None) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": None if bos is None else _bos_first(*bos),
    }


def _bos_first(content: str, id: int) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": content, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {content: {"id": content, "ids": [id], "tokens": [content]}},
    }


def _added_token(id: int, content: str, special: bool) -> dict[str, Any]:
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **rules, "special": special}


def _tokenizer_config(names: Mapping[str, str]) -> dict[str, Any]:
    # The class that takes tokenizer.json as it is; LlamaTokenizer would put a pipeline of its own in its place.
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
