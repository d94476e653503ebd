"""Streamed pieces against whole decoding, on text and on ids at random."""

import json
import random
import re
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
    ids = tokenizer.encode("🎉", add_special_tokens=False)[-1:] * 50_000  # never a whole character
    started = time.process_time()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert time.process_time() - started < 10  # measured: .2 s; decoding from the start each time takes minutes


def whole_search(tokenizer: Tokenizer, ids: list[int], stop: list[str], min_tokens: int) -> tuple[str, int | None]:
    """The slow twin: the text up to the first stop string that a token after the first `min_tokens` completes.

    The whole text is searched after each token. A control token of a stop string is its own text here, between two
    characters that occur nowhere else. Returns the text, and after how many tokens it stopped, or None.
    """
    texts = {text: f"\0{text}\1" for text in tokenizer.special_tokens if text in "".join(stop)}
    marked = list(stop)
    for text, mark in texts.items():
        marked = [re.sub(f"(?<!\0){re.escape(text)}", mark, each) for each in marked]

    name = {id: tokenizer.decode([id], skip_special_tokens=False) for id in ids}

    def text_of(ids: list[int]) -> str:
        return "".join(texts.get(name[id]) or tokenizer.decode([id]) for id in ids)

    def shown(text: str) -> str:
        return re.sub("\0[^\1]*\1", "", text)

    for n in range(min_tokens + 1, len(ids) + 1):
        before, text = len(text_of(ids[: n - 1])), text_of(ids[:n])
        found = [text.find(each, max(0, before - len(each) + 1)) for each in {*stop, *marked}]
        if starts := [start for start in found if start >= 0]:
            return shown(text[: min(starts)]), n
    return shown(text_of(ids)), None


def test_stop_strings_with_control_tokens_and_min_tokens_equal_a_whole_search(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    control = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get)[-2:]
    letters = [next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == c) for c in (b"X", b"Y")]
    ids_of = [*letters, *letters, *(tokenizer.special_tokens[text] for text in control)]
    stopped = cut_inside = 0
    for _ in range(400):
        ids = draw.choices(ids_of, k=draw.randrange(1, 20))
        parts = ["X", "Y", *control]
        stop = ["".join(draw.choices(parts, k=draw.randrange(1, 4))) for _ in range(draw.randrange(1, 4))]
        min_tokens = draw.choice([0, 0, 1, 3, 6])
        stream, pieces, at = DecodeStream(tokenizer, stop, min_tokens), [], None
        for n, id in enumerate(ids, 1):
            pieces.append(stream.push(id))
            if stream.stopped:
                at = n
                break
        pieces.append(stream.flush())
        text, expected_at = whole_search(tokenizer, ids, stop, min_tokens)
        assert ("".join(pieces), at) == (text, expected_at), (ids, stop, min_tokens)
        stopped += at is not None
        cut_inside += any(text in each and text != each for each in stop for text in control)
    assert 100 < stopped < 390
    assert cut_inside > 100


def test_the_text_of_a_control_token_stops_as_letters_too(tokenizer: Tokenizer) -> None:
    text = next(iter(tokenizer.special_tokens))
    stream = DecodeStream(tokenizer, [text])
    ids = tokenizer.encode(f" x{text}y", add_special_tokens=False)  # a user's text: no control token in it
    assert not tokenizer.control_ids & set(ids)
    assert "".join(map(stream.push, ids)) == " x"
    assert stream.stopped
