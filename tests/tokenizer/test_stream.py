"""Streamed pieces against whole decoding, on text and on ids at random."""

import json
import random
import time
from collections.abc import Sequence

import pytest

from llama_mini.errors import RequestError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.stream import DecodeStream

KINDS = ["json", "llama_2_json", "tiktoken", "sentencepiece"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "tiktoken":
        return request.getfixturevalue("llama3_tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(request.getfixturevalue("train_sentencepiece")())
    else:
        spec = request.getfixturevalue("byte_level_spec" if request.param == "json" else "llama_2_spec")()
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.from_pretrained(folder)


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = DecodeStream(tokenizer)
    return [*(stream.push(id) for id in ids), stream.flush()]


def test_pieces_of_a_text_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(f" {text} ")
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "�" not in "".join(pieces)
    assert len(pieces) == len(ids) + 1
    assert pieces[-1] == ""


def test_random_ids_give_the_decoded_whole(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    bytes_only = [id for id in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(id, False)) == 1]
    broken = 0
    for _ in range(500):
        population: Sequence[int] = draw.choice([range(tokenizer.vocab_size), bytes_only])
        ids = draw.choices(population, k=draw.randrange(1, 30))
        whole = tokenizer.decode(ids)
        assert "".join(streamed(tokenizer, ids)) == whole
        broken += "�" in whole
    assert broken > 100  # bytes at random are seldom UTF-8: the hard case did occur


def test_a_character_is_held_back_until_it_is_whole_and_its_rest_is_flushed(tokenizer: Tokenizer) -> None:
    byte_ids = {tokenizer.token_bytes(id, False): id for id in range(tokenizer.vocab_size)}
    ids = [byte_ids[bytes([byte])] for byte in "🎉".encode()]
    assert streamed(tokenizer, ids) == ["", "", "", "🎉", ""]
    assert streamed(tokenizer, ids[:3]) == ["", "", "", "�"] == ["", "", "", tokenizer.decode(ids[:3])]


def test_spaces_are_neither_lost_nor_doubled(tokenizer: Tokenizer) -> None:
    for text in ("hello  world", " hello", "  hello ", " "):
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text


def test_special_tokens_add_nothing_and_a_wrong_id_is_refused(tokenizer: Tokenizer) -> None:
    special = min(tokenizer._backend.special_ids)
    ids = tokenizer.encode(" a", add_special_tokens=False)
    assert "".join(streamed(tokenizer, [special, *ids, special])) == " a"
    with pytest.raises(RequestError, match="outside the vocabulary"):
        DecodeStream(tokenizer).push(tokenizer.vocab_size)


def test_the_time_grows_with_the_length_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🎉", add_special_tokens=False)[-1:] * 200_000  # never a whole character
    started = time.process_time()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert time.process_time() - started < 10  # measured: .3 s; decoding from the start each time takes an hour
