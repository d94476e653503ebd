"""Every decoder of a tokenizer.json gives the text back, or is refused by the name of its step."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import DecodeStream, Tokenizer

Spec = dict[str, Any]
Open = Callable[[Spec], Tokenizer]
BYTE_LEVEL = json.loads(decoders.ByteLevel().__getstate__())
FUSE, BYTES = {"type": "Fuse"}, {"type": "ByteFallback"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def replace(old: str, new: str = " ") -> Spec:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def metaspace(scheme: str, mark: str = "▁", split: bool = True) -> Spec:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": split}


def sequence(*steps: Spec) -> Spec:
    return {"type": "Sequence", "decoders": list(steps)}


LLAMA_2 = sequence(replace("▁"), BYTES, FUSE, STRIP)


@pytest.fixture
def opened(write_directory: Callable[[Spec], Any]) -> Open:
    return lambda spec: Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))


@pytest.fixture(scope="module")
def train(corpus: list[str]) -> Callable[..., Spec]:
    """A small BPE (with bytes as a fallback) or Unigram vocabulary, trained on words that a Metaspace made."""
    made: dict[str, Spec] = {}

    def trained(kind: str, mark: str, split: bool) -> Spec:
        key = f"{kind}{mark}{split}"
        if key not in made:
            tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if kind == "BPE" else ["<unk>"]
            options: dict[str, Any] = {"vocab_size": 600, "special_tokens": tokens, "show_progress": False}
            if kind == "BPE":
                tokenizer = RustTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
                trainer: Any = trainers.BpeTrainer(limit_alphabet=80, **options)
            else:
                tokenizer = RustTokenizer(models.Unigram())
                trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(mark, prepend_scheme="always", split=split)
            tokenizer.train_from_iterator([line[:80] for line in corpus], trainer)
            made[key] = json.loads(tokenizer.to_str()) | {"added_tokens": []}
        return json.loads(json.dumps(made[key]))

    return trained


def check(tokenizer: Tokenizer, spec: Spec, texts: list[str], library: bool) -> None:
    """The library's ids; the same text back, whole and streamed; the library's text where its decoder is right."""
    theirs = RustTokenizer.from_str(json.dumps(spec))
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text).ids
        assert tokenizer.decode(ids) == text
        stream = DecodeStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.flush()]) == text
        assert not library or theirs.decode(ids) == text


@pytest.mark.parametrize(
    ("decoder", "library"),
    [
        (BYTE_LEVEL, True),
        (sequence(BYTE_LEVEL, FUSE), True),
        (sequence(FUSE, sequence(BYTE_LEVEL)), True),
        (sequence(replace("▁"), BYTES, FUSE, BYTE_LEVEL), True),
        (LLAMA_2, False),  # mlx-lm#1041: tekken v13, Step-3.7, and LlamaTokenizer of early transformers 5
        (sequence(BYTES, FUSE, replace("▁")), False),
        (metaspace("always"), False),
        (sequence(replace("Ġ"), FUSE), False),
        (None, False),
    ],
)
def test_byte_level_tokens_are_bytes_whatever_the_decoder(
    byte_level_spec: Callable[[], Spec], opened: Open, decoder: Spec | None, library: bool
) -> None:
    spec = byte_level_spec() | {"decoder": decoder}
    texts = ["Hello! How can I assist?", "é 天空🎉e\u0301\r\n\t\0▁", " no space was added", "", " "]
    check(opened(spec), spec, texts, library)


@pytest.mark.parametrize("before", [[], [{"type": "NFC"}], [{"type": "Lowercase"}, {"type": "NFD"}]])
@pytest.mark.parametrize("decoder", [BYTE_LEVEL, None])
def test_a_byte_level_normalizer_opens(
    byte_level_spec: Callable[[], Spec], opened: Open, before: list[Spec], decoder: Spec | None
) -> None:
    """It has no settings, unlike the pre-tokenizer of this name. An added word is found under its normalized name."""
    step = {"type": "ByteLevel"}
    normalizer = {"type": "Sequence", "normalizers": [*before, step]} if before else step
    word = {"id": 600, "content": "thé", "single_word": False, "lstrip": False, "rstrip": False, "special": False}
    spec = byte_level_spec() | {"normalizer": normalizer, "pre_tokenizer": None, "decoder": decoder}
    spec["added_tokens"].append(word | {"normalized": True})
    texts = ["the cat, a  thé", "天空🎉\r\n\t\0", " no space", ""]
    check(opened(spec), spec, [text for text in texts if not (before and "é" in text)], library=decoder is not None)
    theirs = RustTokenizer.from_str(json.dumps(spec))
    for text in ("athé b", "THÉ", "e\u0301"):
        assert opened(spec).encode(text) == theirs.encode(text).ids


def test_a_byte_level_split_among_other_steps_is_found(byte_level_spec: Callable[[], Spec], opened: Open) -> None:
    spec = byte_level_spec()
    digits = {"type": "Digits", "individual_digits": True}
    inner = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    spec |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [inner]}, "decoder": LLAMA_2}
    check(opened(spec), spec, ["the 12 é"], library=False)
    spec["pre_tokenizer"] = BYTE_LEVEL  # it adds a space, which Strip drops
    check(opened(spec), spec, ["the 12 é"], library=False)


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("mark", ["▁", "_"])
def test_metaspace_gives_the_text_back(
    train: Callable[..., Spec], opened: Open, kind: str, split: bool, scheme: str, mark: str
) -> None:
    spec = train(kind, mark, split) | {"pre_tokenizer": metaspace(scheme, mark, split)}
    strip = [] if scheme == "never" else [STRIP]
    texts = ["the cat, the hat", "two  spaces", "a 7 b", "line\n\nbreak"] + (["é 天🎉"] if kind == "BPE" else [])
    whole = scheme == "never" or split  # else the library drops every space of the first token
    for decoder, library in (
        (metaspace(scheme, mark, split), whole and kind == "Unigram"),  # the library decodes no byte tokens here
        (sequence(BYTES, metaspace(scheme, mark)), whole),
        (sequence(replace(mark), BYTES, FUSE, *strip), True),
        (None, False),
    ):
        tokenizer = opened(spec | {"decoder": decoder})
        check(tokenizer, spec | {"decoder": decoder}, texts, library)
        two = tokenizer.decode(tokenizer.encode("  the"))  # no space is put before one, but decoding drops one
        assert two == ("  the" if scheme == "never" else " the")


@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
def test_older_spellings_of_metaspace_open(train: Callable[..., Spec], opened: Open, part: str) -> None:
    """The library itself refuses `add_prefix_space: false` without `prepend_scheme`."""
    spec = train("BPE", "▁", True)
    for adds in (True, False):
        scheme = "always" if adds else "never"
        spec |= {"pre_tokenizer": metaspace(scheme), "decoder": metaspace(scheme)}
        older = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": adds}
        ours, new = opened(spec | {part: older}), opened(spec)
        assert ours.encode("the cat") == new.encode("the cat")
        assert ours.decode(ours.encode("the cat")) == "the cat"
    nested = {"type": "Sequence", "decoders" if part == "decoder" else "pretokenizers": [older]}
    assert opened(spec | {part: nested}).encode("the cat") == new.encode("the cat")


@pytest.mark.parametrize("order", itertools.permutations([replace("▁"), BYTES, FUSE, STRIP]))
def test_the_steps_of_sentencepiece_stand_in_any_order(
    llama_2_spec: Callable[[], Spec], opened: Open, order: tuple[Spec, ...]
) -> None:
    """The library is right if Fuse comes after ByteFallback and before Strip."""
    spec = llama_2_spec() | {"post_processor": None, "decoder": sequence(*order)}
    library = order.index(BYTES) < order.index(FUSE) < order.index(STRIP) and order[0] != STRIP
    library = library and order.index(replace("▁")) < order.index(STRIP)
    check(opened(spec), spec, ["the  cat é🎉\n", " the"], library)


def test_other_strings_are_replaced_before_the_tokens_are_joined(
    llama_2_spec: Callable[[], Spec], opened: Open
) -> None:
    spec = llama_2_spec() | {"post_processor": None}
    spec["decoder"] = sequence(replace("the", "THE"), replace("▁"), BYTES, FUSE, replace("c", "k"), STRIP)
    tokenizer = opened(spec)
    for text in ("the cat, the hat", "cc"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == RustTokenizer.from_str(json.dumps(spec)).decode(ids) != text


@pytest.mark.parametrize(
    "step",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Replace", "pattern": {"Regex": "▁+"}, "content": " "},
        {"type": "Strip", "content": " ", "start": 0, "stop": 1},
        {"type": "Strip", "content": " ", "start": 2, "stop": 0},
        replace("th", "TH"),  # after Fuse
    ],
)
def test_a_step_that_needs_the_whole_text_is_refused(
    llama_2_spec: Callable[[], Spec], opened: Open, step: Spec
) -> None:
    shown = json.dumps(step, ensure_ascii=False)
    with pytest.raises(TokenizerError) as caught:
        opened(llama_2_spec() | {"decoder": sequence(replace("▁"), FUSE, step)})
    assert f"tokenizer.json: its decoder has the step {shown}, which cannot be applied token by token" in str(
        caught.value
    )


def test_a_vocabulary_that_does_not_say_how_to_decode_is_refused(
    byte_level_spec: Callable[[], Spec], opened: Open
) -> None:
    with pytest.raises(TokenizerError, match="it has no decoder, and no ByteLevel or Metaspace pre-tokenizer"):
        opened(byte_level_spec() | {"decoder": None, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(
        TokenizerError, match=r'"Replace", "pattern": \{"String": "a"\}.* token by token; known: ByteLevel'
    ):
        opened(byte_level_spec() | {"decoder": sequence(BYTE_LEVEL, replace("a", "b"))})
