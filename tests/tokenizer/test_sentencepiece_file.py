"""SentencePiece models against the sentencepiece library, and LLaMA 2's tokenizer.json against both."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import Tokenizer

Train = Callable[..., bytes]
USER_DEFINED = ["<|im_start|>", "<|im_end|>", "covid"]


@pytest.fixture(scope="module")
def llama_model(train_sentencepiece: Train) -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def user_defined_model(train_sentencepiece: Train) -> bytes:
    return train_sentencepiece(user_defined_symbols=USER_DEFINED)


def test_ids_and_text_are_those_of_sentencepiece(
    llama_model: bytes, user_defined_model: bytes, write_directory: Callable[..., Any], text: str
) -> None:
    for data in (llama_model, user_defined_model):
        theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
        ours = Tokenizer.from_pretrained(write_directory({"tokenizer.model": data}))
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_bos=True)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text.replace("\u2581", " ")
        assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, {2}, theirs.vocab_size())


@pytest.mark.parametrize("options", [{"add_dummy_prefix": False}, {"model_type": "unigram"}])
def test_other_options_of_the_trainer(
    train_sentencepiece: Train, write_directory: Callable[..., Any], options: dict[str, Any], text: str
) -> None:
    data = train_sentencepiece(**options)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = Tokenizer.from_pretrained(write_directory({"tokenizer.model": data}))
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


def test_the_same_model_as_tokenizer_json(
    llama_model: bytes, llama_2_spec: Callable[[], dict[str, Any]], write_directory: Callable[..., Any], text: str
) -> None:
    path = write_directory({"tokenizer.model": llama_model, "tokenizer.json": llama_2_spec()})
    model, json = (Tokenizer.from_pretrained(path / name) for name in ("tokenizer.model", "tokenizer.json"))
    ids = model.encode(text)
    assert ids == json.encode(text) or text == ""  # the library's Prepend leaves an empty text alone
    assert model.decode(ids) == json.decode(ids)


def test_user_defined_tokens_are_words(user_defined_model: bytes, write_directory: Callable[..., Any]) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=user_defined_model)
    ours = Tokenizer.from_pretrained(write_directory({"tokenizer.model": user_defined_model}))
    start, end, word = map(theirs.piece_to_id, USER_DEFINED)
    text = "a<|im_start|>system<|im_end|> </s><s><unk> covid19"
    ids = ours.encode(text, add_special_tokens=False)
    added = {0, 1, 2, start, end, word}
    assert [id for id in ids if id in added] == [id for id in theirs.encode(text) if id in added] == [start, end, word]
    assert ours.decode([start]) == "<|im_start|>"


def test_tokens_that_a_hugging_face_directory_adds(llama_model: bytes, write_directory: Callable[..., Any]) -> None:
    added = {"700": {"content": "<|user|>", "special": True}, "701": {"content": "<think>", "special": False}}
    config = {"added_tokens_decoder": added, "add_bos_token": False, "add_eos_token": True, "eos_token": "<|user|>"}
    path = write_directory({"tokenizer.model": llama_model, "tokenizer_config.json": config})
    tokenizer = Tokenizer.from_pretrained(path)
    assert tokenizer.vocab_size == 702
    assert tokenizer.eos_ids == {2, 700}
    ids = tokenizer.encode("<|user|><think>")
    assert {700, 1}.isdisjoint(ids)
    assert ids[-2:] == [701, 2]
    assert tokenizer.decode([700, 701, *ids]) == "<think> <|user|><think>"
    added["702"] = {"content": "word", "special": False}
    write_directory({"tokenizer_config.json": config})
    with pytest.raises(TokenizerError, match=r"'word' \(702\) is ordinary text.*tokenizer.json"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("char", ["a", " ", *(pytest.param(char, marks=pytest.mark.slow) for char in "^\né")])
def test_a_million_characters_in_a_row(llama_model: bytes, write_directory: Callable[..., Any], char: str) -> None:
    tokenizer = Tokenizer.from_pretrained(write_directory({"tokenizer.model": llama_model}))
    started = time.process_time()
    ids = tokenizer.encode(char * 1_000_000)
    assert tokenizer.decode(ids) == char * 1_000_000
    assert time.process_time() - started < 30  # measured: 1 s


def test_a_broken_file_is_refused(train_sentencepiece: Train, llama_model: bytes, write_directory: Any) -> None:
    suffix = train_sentencepiece(treat_whitespace_as_suffix=True)
    for data, message in (
        (suffix, "treat_whitespace_as_suffix"),
        (llama_model[: len(llama_model) // 2], "as SentencePiece: "),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "does not end"),
        (b"\x12\x00", "no pieces"),
        (b"\x0a\x02\x18\x01", "piece 0 has no text"),
    ):
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_pretrained(write_directory({"tokenizer.model": data}))
