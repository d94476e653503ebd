"""Stop strings in a stream of text pieces, against cutting the whole text."""

import random
from collections.abc import Mapping

import pytest

from llama_mini.tokenizer.stream import DecodeStream, _overlap


class Pieces:
    """A tokenizer whose ids are indices into a list of strings."""

    strips_space = False
    special_tokens: Mapping[str, int] = {}

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id].encode()


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    stream = DecodeStream(Pieces(pieces), stop)
    out = []
    for i in range(len(pieces)):
        out.append(stream.push(i))
        if stream.stopped:
            break
    return [*out, stream.flush()], stream.stopped


def test_random_cuts_of_random_text() -> None:
    rng = random.Random(0)
    met = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(30)))
        stop = "".join(rng.choices("ab\n", k=rng.randrange(1, 5)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, stopped = run(pieces, (stop,))
        assert stopped == (stop in text)
        assert "".join(out) == text.split(stop)[0]
        met += stopped
    assert 500 < met < 2500  # both cases were really tried


def test_text_is_held_only_as_long_as_it_could_be_a_stop_string() -> None:
    out, stopped = run(["one <", "|e", "ND", "|> two"], ("<|end|>",))
    assert out == ["one ", "", "<|eND", "|> two", ""]
    assert not stopped


def test_the_first_of_several_stop_strings_holds() -> None:
    out, stopped = run(["some text, and more"], ("more", "and", "absent"))
    assert out == ["some text, ", ""]
    assert stopped


def test_what_was_held_back_is_flushed_at_the_end() -> None:
    out, stopped = run(["abc", "##"], ("###",))
    assert out == ["abc", "", "##"]
    assert not stopped


@pytest.mark.parametrize(("text", "stop", "n"), [("xab", "abc", 2), ("abc", "abc", 0), ("aa", "aaa", 2), ("", "a", 0)])
def test_overlap(text: str, stop: str, n: int) -> None:
    assert _overlap(text, stop) == n
