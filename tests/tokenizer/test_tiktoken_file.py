"""LLaMA 3's tiktoken file against its tokenizer.json and tiktoken itself."""

import base64
import time
from collections.abc import Callable
from typing import Any

import pytest
import tiktoken

from llama_mini.errors import RequestError, TokenizerError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.tiktoken_file import MAX_CHARS, MAX_RUN, bounded_parts


@pytest.fixture(scope="module")
def both(llama3_tiktoken: Tokenizer, llama3_json: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    return llama3_tiktoken, llama3_json


def write_ranks(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


BYTES = [bytes([byte]) for byte in range(256)]


def test_both_files_give_equal_ids(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    model, json = both
    ids = model.encode(text, add_special_tokens=False)
    assert ids == json.encode(text, add_special_tokens=False)
    assert model.encode(text) == [128_000, *ids]
    assert model.decode([128_000, *ids, 128_009]) == text
    assert model.decode([128_000, *ids, 128_009], skip_special_tokens=False) == f"<|begin_of_text|>{text}<|eot_id|>"


def test_special_tokens_are_numbered_as_in_llama_3_1(both: tuple[Tokenizer, Tokenizer]) -> None:
    model, json = both
    # From the tokenizer_config.json of Llama-3.1-8B-Instruct.
    published = {128004: "finetune_right_pad_id", 128006: "start_header_id", 128007: "end_header_id"}
    published |= {128008: "eom_id", 128009: "eot_id", 128010: "python_tag", 128255: "reserved_special_token_247"}
    for id, name in published.items():
        if id != 128255:  # there, 128011 is reserved; Meta's own files call it <|image|>
            assert model.decode([id], skip_special_tokens=False) == f"<|{name}|>"
    assert (model.bos_id, model.eos_ids, model.vocab_size) == (128_000, {128_001, 128_008, 128_009}, 128_256)
    assert json.vocab_size == model.vocab_size


@pytest.mark.parametrize("char", ["a", " ", *(pytest.param(char, marks=pytest.mark.slow) for char in "^\né")])
def test_a_million_characters_in_a_row(both: tuple[Tokenizer, Tokenizer], char: str) -> None:
    started = time.process_time()
    ids = both[0].encode(char * 1_000_000)
    assert both[0].decode(ids) == char * 1_000_000
    assert time.process_time() - started < 30  # measured: .4 s


def test_long_runs_are_cut_where_meta_cuts_them(both: tuple[Tokenizer, Tokenizer], llama3_files: Any) -> None:
    raw = tiktoken.Encoding(
        "raw",
        pat_str=r"\p{L}+|\s+",
        mergeable_ranks={
            base64.b64decode(token): int(rank)
            for token, rank in (line.split() for line in llama3_files.tiktoken.read_bytes().splitlines())
        },
        special_tokens={},
    )
    whole, rest = raw.encode_ordinary("b" * 25_000), raw.encode_ordinary("b" * 10_000)
    assert both[0].encode("b" * 60_000, add_special_tokens=False) == whole * 2 + rest
    assert list(bounded_parts("ab " * MAX_RUN)) == ["ab " * MAX_RUN]
    assert [len(part) for part in bounded_parts("x" + " " * MAX_RUN + " y")] == [1 + MAX_RUN, 2]
    assert [len(part) for part in bounded_parts("x y " * MAX_CHARS)] == [MAX_CHARS] * 4
    assert list(bounded_parts("")) == []


def test_a_panic_of_the_library_is_a_request_error(
    both: tuple[Tokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panicking:
        def encode_ordinary(self, text: str) -> list[int]:
            raise type("PanicException", (BaseException,), {})("stack overflow")

    monkeypatch.setattr(both[0]._backend, "_encoding", Panicking())
    with pytest.raises(RequestError, match="stack overflow"):
        both[0].encode("x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (write_ranks(BYTES[:200]), "56 of the 256 single bytes"),
        (write_ranks(BYTES).replace(b" 7\n", b" 9\n"), "line 8 has rank 9, expected 7"),
        (write_ranks([*BYTES, b"ab"]) + b"junk\n", "line 258 is not a base64 token"),
        (write_ranks([*BYTES, b"ab", b"ab"]), "line 258 repeats the token of rank 256"),
    ],
)
def test_a_broken_file_names_its_line(write_directory: Callable[..., Any], data: bytes, message: str) -> None:
    path = write_directory({"tokenizer.model": data})
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_pretrained(path)


def test_a_small_vocabulary_works(write_directory: Callable[..., Any]) -> None:
    tokenizer = Tokenizer.from_pretrained(write_directory({"tokenizer.model": write_ranks([*BYTES, b"ab", b" c"])}))
    assert tokenizer.encode("ab c!") == [258, 256, 257, ord("!")]
    assert tokenizer.vocab_size == 258 + 256
