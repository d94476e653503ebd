"""A SentencePiece vocabulary in a GGUF file: what its scores join, and every way in which its metadata can be wrong."""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.errors import LlamaMiniWarning, TokenizerError
from llama_mini.tokenizer.gguf_vocabulary import GGUFVocabulary
from llama_mini.tokenizer.tokenizer_json import BYTE_TOKENS, merges_by_score

# No merge of a trained vocabulary has a better score than its parts; here some do, as in a unigram vocabulary.
SCORES = {"▁": -2, "a": -3, "b": -3, "c": -3, "ab": -4.5, "bc": -4, "abc": -9, "▁a": -4.2, "▁ab": -3.5, "ca": -4.1}
SCORES |= {"▁▁": -5, "cab": -1}
TOKENS = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *SCORES]
TYPES = [2, 3, 3] + [6] * 256 + [1] * len(SCORES)


def header(**changes: Any) -> GGUFHeader:
    """A header whose `tokenizer.ggml.` keys are sound but for `changes`; None leaves a key out."""
    keys = {
        "model": "llama",
        "tokens": TOKENS,
        "scores": np.array([0] * 259 + list(SCORES.values()), np.float32),
        "token_type": np.array(TYPES, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return GGUFHeader(Path("tiny.gguf"), 3, metadata | {"llama.context_length": 128}, {})


def with_token(content: str, type_: int, score: float = -7.0) -> dict[str, Any]:
    """The changes that add a token at the end."""
    scores = np.array([0, *[0] * 258, *SCORES.values(), score], np.float32)
    return {"tokens": [*TOKENS, content], "token_type": np.array([*TYPES, type_]), "scores": scores}


def vocabulary(**changes: Any) -> GGUFVocabulary:
    return GGUFVocabulary(header(**changes))


def tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(vocabulary(**changes).tokenizer_json()))


def test_merges_are_all_the_cuts_of_a_piece_by_its_score() -> None:
    pieces = ["a", "aa", "b", "aab", "ab", "</s>", "s>"]
    merges = merges_by_score(pieces, [0, -3, 0, -2, -5, 0, 0], [0, 1, 2, 3, 4])
    assert merges == [["a", "ab"], ["aa", "b"], ["a", "a"], ["a", "b"]]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [  # by llama.cpp itself (xllamacpp 2026.10.11549)
        ("abc cab abcab", "▁a|bc|▁|cab|▁a|bc|ab"),
        ("  aabcé", "▁▁|▁a|abc|<0xC3>|<0xA9>"),
        ("cabca ab\nbc", "▁|ca|bc|a|▁ab|<0x0A>|bc"),
    ],
)
def test_scores_decide_as_in_llama_cpp(text: str, tokens: str) -> None:
    encoded = tokenizer().encode(text)
    assert encoded.tokens == ["<s>", *tokens.split("|")]
    assert tokenizer().decode(encoded.ids) == text


def test_transformers_loads_it(tmp_path: Path) -> None:
    for changes, before, after in (
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
    ):
        found = header(**changes)
        (tmp_path / "tokenizer.json").write_text(json.dumps(GGUFVocabulary(found).tokenizer_json()), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(GGUFVocabulary(found).tokenizer_config()), encoding="utf-8"
        )
        ids = tokenizer().encode("  ab cab é", add_special_tokens=False).ids
        for theirs in (
            AutoTokenizer.from_pretrained(tmp_path),
            PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
        ):
            assert theirs.encode("  ab cab é") == [*before, *ids, *after]
            assert theirs.decode(ids) == "  ab cab é"
        assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"


def test_the_space_in_front_and_extra_spaces_are_the_files_rule() -> None:
    assert tokenizer().encode(" ab").tokens == ["<s>", "▁", "▁ab"]
    bare = tokenizer(add_space_prefix=False)
    assert bare.encode(" ab").tokens == ["<s>", "▁ab"]
    assert bare.decode(bare.encode(" ab").ids) == " ab"
    squeezed = tokenizer(remove_extra_whitespaces=True)
    assert squeezed.encode("  ab \n   a  ").tokens == ["<s>", "▁ab", "▁", "<0x0A>", "▁a"]
    assert squeezed.encode("   ", add_special_tokens=False).tokens == []


def test_ids_that_the_file_does_not_state() -> None:
    absent: dict[str, Any] = {f"{name}_token_id": None for name in ("bos", "eos", "unknown")}
    assert vocabulary(**absent).tokenizer_json() == vocabulary().tokenizer_json()
    assert vocabulary(**absent).eos_ids == [2]
    absent["token_type"] = np.array([2, 4, 3, *TYPES[3:]])  # <s> is no control token
    with pytest.raises(TokenizerError, match="add_bos_token is true or absent, but there is no bos_token_id"):
        vocabulary(**absent).tokenizer_json()


def test_token_types() -> None:
    assert vocabulary().kind == "GGUF SentencePiece"
    for type_, matched, special in ((1, False, None), (3, True, True), (4, True, False), (5, True, True)):
        spec = vocabulary(**with_token("a▁a", type_)).tokenizer_json()
        assert [token["special"] for token in spec["added_tokens"][3:]] == ([special] if matched else [])
        assert (["a", "▁a"] in spec["model"]["merges"]) == (type_ == 1)  # text reaches no other by joining pieces
    user_defined = tokenizer(**with_token("c▁▁c", 4))
    assert user_defined.encode("abc  ca").tokens == ["<s>", "▁ab", "c  c", "▁a"]


def test_phi_3_takes_the_white_space_after_its_tokens() -> None:
    """As llama.cpp does by `general.name`; checked with its ggml-vocab-phi-3.gguf."""
    found = header(**with_token("<|end|>", 3))
    found.metadata["general.name"] = "Phi-3 mini"
    phi_3 = Tokenizer.from_str(json.dumps(GGUFVocabulary(found).tokenizer_json()))
    text = "<|end|> \n\n ab</s> \tca<s> b"
    tokens = [phi_3.id_to_token(id) for id in phi_3.encode(text).ids]
    assert tokens == ["<s>", "<|end|>", "▁ab", "</s>", "▁", "ca", "<s>", "▁▁", "b"]
    assert tokenizer(**with_token("<|end|>", 3)).encode(text).tokens[2:5] == ["▁▁", "<0x0A>", "<0x0A>"]


def test_bytes_or_an_unknown_token() -> None:
    tokens = [token if token != "<0xC3>" else "byte" for token in TOKENS]
    assert tokenizer(tokens=tokens).encode("aéa").ids == [1, TOKENS.index("▁a"), 0, TOKENS.index("a")]
    types = np.array([3, *TYPES[1:]])
    with pytest.raises(TokenizerError, match="tokens lacks some of the 256 byte tokens"):
        vocabulary(tokens=tokens, token_type=types, unknown_token_id=None).tokenizer_json()
    assert tokenizer(token_type=types, unknown_token_id=None).encode("é").tokens[-2:] == ["<0xC3>", "<0xA9>"]


def test_equal_scores_warn() -> None:
    with pytest.warns(LlamaMiniWarning, match="scores has 1 repeated scores"):
        vocabulary(**with_token("bca", 1, score=-9.0)).tokenizer_json()


def test_merges_of_a_large_vocabulary_take_less_than_a_second() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(2, 9))) for _ in range(40_000)]
    pieces = list(dict.fromkeys([*"abcdefghij", *words]))[:32_000]
    started = time.process_time()
    merges = merges_by_score(pieces, [-float(i) for i in range(len(pieces))], range(len(pieces)))
    assert time.process_time() - started < 1  # measured: 0.2 s
    assert len(merges) > 20_000


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no scores": ({"scores": None}, "scores is missing"),
    "scores too short": ({"scores": np.zeros(3, np.float32)}, f"scores must be an array of {len(TOKENS)} numbers"),
    "scores of text": ({"scores": ["a"] * len(TOKENS)}, "scores must be an array"),
    "a score": ({"scores": 1.0}, "scores must be an array"),
    "NaN": ({"scores": np.full(len(TOKENS), np.nan, np.float32)}, "scores holds nan; every score must be finite"),
    "infinite": ({"scores": np.full(len(TOKENS), -np.inf, np.float32)}, "scores holds -inf"),
    "types too long": ({"token_type": np.ones(999, int)}, "token_type must be an array"),
    "unknown type": ({"token_type": np.array([0, *TYPES[1:]])}, "token_type holds 0; 1 to 6 are known"),
    "token twice": ({"tokens": [*TOKENS[:-1], "ab"]}, "tokens holds 'ab' twice"),
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "id no number": ({"bos_token_id": "<s>"}, "bos_token_id must be a token from 0 to .*, not '<s>'"),
    "flag": ({"add_space_prefix": 1}, "add_space_prefix must be true or false, not 1"),
    "charsmap": ({"precompiled_charsmap": np.ones(9, np.uint8)}, "precompiled_charsmap changes characters"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_metadata_is_one_sentence(fault: str) -> None:
    changes, sentence = FAULTS[fault]
    with pytest.raises(TokenizerError, match=sentence) as caught:
        _ = vocabulary(**changes).tokenizer_json(), vocabulary(**changes).tokenizer_config()
    assert str(caught.value).startswith("tiny.gguf: tokenizer.ggml.")
    assert "\n" not in str(caught.value)
