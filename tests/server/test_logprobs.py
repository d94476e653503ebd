"""Which tokens are sent with which text, where tokens are longer than a character."""

import math
from types import SimpleNamespace

import pytest

from llama_mini.server.logprobs import LEAST, Entry, TokenLogprobs, TokenNames, chat_logprobs, text_logprobs

TOKENS = [b"The", b" quick", b" brown", b" fox", b"\xf0\x9f", b"\x98", b"\x80 hi", b" Space"]
TOKENIZER = SimpleNamespace(token_bytes=lambda id, skip_special_tokens=True: TOKENS[id], strips_space=False)


def pushed(ids: list[int], tokenizer: SimpleNamespace = TOKENIZER, start: int = 0) -> TokenLogprobs:
    tokens = TokenLogprobs(tokenizer, start)
    for id in ids:
        tokens.push(id, -1.0, [])
    return tokens


def texts(entries: list[Entry]) -> list[str]:
    return [entry.text for entry in entries]


def test_a_token_waits_until_all_of_its_text_is_sent() -> None:
    """Of ` brown`, `own` may begin the stop string `own fox`."""
    tokens = pushed([0, 1, 2])
    assert texts(tokens.sent(len("The quick br"))) == ["The", " quick"]
    assert texts(tokens.sent(len("The quick brown"))) == [" brown"]


def test_of_a_stop_string_nothing_is_shown() -> None:
    tokens = pushed([0, 1, 2, 3])
    tokens.sent(len("The quick br"))
    cut, gone = tokens.rest("The quick br")
    assert (cut.text, cut.bytes, gone.text, gone.bytes) == (" br", b" br", "", b"")


def test_parts_of_a_character_come_with_it() -> None:
    tokens = pushed([4, 5, 6])
    assert tokens.sent(0) == []
    entries = tokens.sent(len("\N{GRINNING FACE} hi"))
    assert texts(entries) == ["", "", "\N{GRINNING FACE} hi"]
    assert b"".join(entry.bytes for entry in entries).decode() == "\N{GRINNING FACE} hi"
    assert texts(pushed([0, 4]).rest("The\ufffd")) == ["The", "\ufffd"]


@pytest.mark.parametrize("start", [0, 7])
def test_offsets_and_the_space_that_decoding_drops(start: int) -> None:
    strips = SimpleNamespace(token_bytes=TOKENIZER.token_bytes, strips_space=True)
    entries = pushed([7, 3], strips, start).rest("Space fox")
    assert texts(entries) == ["Space", " fox"]
    shown = text_logprobs(TokenNames(strips, by_id=False), entries)
    assert shown["text_offset"] == [start, start + 5]
    assert entries[0].bytes == b"Space"


def test_minus_infinity_is_a_number_that_json_has() -> None:
    tokens = TokenLogprobs(TOKENIZER)
    tokens.push(0, -math.inf, [(1, -0.5), (4, -math.inf)])
    entries, names = tokens.rest("The"), TokenNames(TOKENIZER, by_id=False)
    (chosen,) = chat_logprobs(names, entries)["content"]
    assert chosen["logprob"] == chosen["top_logprobs"][1]["logprob"] == LEAST
    assert text_logprobs(names, entries)["top_logprobs"] == [{"The": LEAST, " quick": -0.5, "bytes:\\xf0\\x9f": LEAST}]
    (top,) = text_logprobs(names, entries)["top_logprobs"]
    assert next(iter(top)) == "The"  # the token itself is the first, as in vLLM
