"""tokenizer.json: the ids of transformers for clean text, and no control token for any text."""

import copy
import json
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import Tokenizer
from llama_mini.tokenizer.hf_json import _encoder, _pairs

Spec = dict[str, Any]
Write = Callable[[Spec], Any]
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@pytest.fixture(scope="module")
def llama3(llama3_json: Tokenizer, llama3_transformers: PreTrainedTokenizerFast) -> tuple[Tokenizer, Any]:
    return llama3_json, llama3_transformers


def with_added(spec: Spec, *tokens: str, **flags: bool) -> Spec:
    """The spec with more added tokens, numbered on."""
    for content in tokens:
        ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]
        spec["added_tokens"].append(PLAIN | {"id": max(ids) + 1, "content": content} | flags)
    return spec


def test_llama_3_ids_are_those_of_transformers(llama3: Any, text: str) -> None:
    ours, theirs = llama3
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def test_ids_and_text_are_those_of_auto_tokenizer(
    byte_level_spec: Callable[[], Spec], llama_2_spec: Callable[[], Spec], write_directory: Write, text: str
) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    for spec in (byte_level_spec() | {"truncation": cut}, llama_2_spec()):  # transformers ignores the cut
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": True}  # transformers ignores this one
        path = write_directory({"tokenizer.json": spec, "tokenizer_config.json": config})
        ours, theirs = Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        for added in (True, False):
            ids = ours.encode(text, add_special_tokens=added)
            assert ids == theirs.encode(text, add_special_tokens=added)
        for skipped in (True, False):
            assert ours.decode(ids, skipped) == theirs.decode(ids, skip_special_tokens=skipped)
        assert ours.vocab_size == len(theirs)


def test_post_processor_frames_a_text_on_both_sides(
    byte_level_spec: Callable[[], Spec], write_directory: Write
) -> None:
    tokenizer = RustTokenizer.from_str(json.dumps(byte_level_spec()))
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing("<|begin|> $A <|end|>", None, [("<|begin|>", 0), ("<|end|>", 1)])
    path = write_directory({"tokenizer.json": tokenizer.to_str()})
    ours = Tokenizer.from_pretrained(path)
    assert ours.encode("hi") == tokenizer.encode("hi").ids
    assert ours.encode("") == [0, 1]


def test_no_text_becomes_a_special_token(
    byte_level_spec: Callable[[], Spec], llama_2_spec: Callable[[], Spec], write_directory: Write
) -> None:
    for spec in (byte_level_spec(), llama_2_spec()):
        spec = with_added(spec, "<think>", "</think>", normalized=True, special=True)
        spec["model"]["vocab"]["<pad>"] = 900  # a token of the model's own, and an ordinary word, which stays one
        named = {"pad_token": "<pad>", "sep_token": "he"}
        tokenizer = Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec, "tokenizer_config.json": named}))
        control = {token["content"] for token in spec["added_tokens"]} | {"<pad>"}
        assert set(tokenizer._backend.control_ids) == control
        ids = set(tokenizer._backend.control_ids.values())
        for content in control:
            for text in (content, f" {content}", f"a{content}b\n", content * 3, f"<{content}>"):
                encoded = tokenizer.encode(text, add_special_tokens=False)
                assert not ids.intersection(encoded), (content, text)
                assert tokenizer.decode(encoded).strip() == text.strip()
        assert tokenizer.decode([900]) == ""


def test_tokenizer_config_marks_tokens_as_special_too(
    byte_level_spec: Callable[[], Spec], write_directory: Write
) -> None:
    decoder = {"600": PLAIN | {"content": "<a>", "special": True}, "601": PLAIN | {"content": "<b>"}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    path = write_directory(
        {"tokenizer.json": with_added(byte_level_spec(), "<a>", "<b>"), "tokenizer_config.json": config}
    )
    ours, theirs = Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert ours.decode([600, 601]) == theirs.decode([600, 601], skip_special_tokens=True) == "<b>"
    ids = ours.encode("<a><b>")
    assert 600 not in ids
    assert ids[-1] == 601


def test_control_tokens_of_a_unigram_model_are_not_matched(write_directory: Write) -> None:
    vocab = [["<unk>", 0.0], ["</s>", -0.5], ["▁", -2.0], *([char, -3.0] for char in "</s>abc")]
    spec = {
        "added_tokens": [PLAIN | {"id": id, "content": vocab[id][0], "special": True} for id in (0, 1)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False},
    }
    tokenizer = Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))
    ids = tokenizer.encode("ab</s> c")
    assert 1 not in ids
    assert tokenizer.decode(ids) == "ab</s> c"
    assert tokenizer.encode("é") == [0]  # what the model itself does not know is still unknown


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_byte_tokens_that_a_file_adds_are_the_bytes_of_text(write_directory: Write, kind: str, special: bool) -> None:
    """BpeTrainer(special_tokens=...) writes such files. The library leaves special bytes out of a decoded text."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model, trainer = (models.BPE(byte_fallback=True, unk_token="<unk>"), trainers.BpeTrainer)
    if kind == "Unigram":
        model, trainer = models.Unigram([], byte_fallback=True), partial(trainers.UnigramTrainer, unk_token="<unk>")
    theirs = RustTokenizer(model)
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    theirs.decoder = decoders.Sequence(steps)
    theirs.train_from_iterator(["the cat sat"] * 9, trainer(vocab_size=300, show_progress=False, special_tokens=tokens))
    spec = json.loads(theirs.to_str())
    for token in spec["added_tokens"]:
        token["special"] = special
    spec["model"]["byte_fallback"] = True  # the trainer of a Unigram model drops it
    theirs = RustTokenizer.from_str(json.dumps(spec))
    ours = Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))
    for text in ("a\nz", "the cat é🎉", "\x00<0>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == text
    assert ours.vocab_size == theirs.get_vocab_size()


@pytest.mark.parametrize(
    ("left", "right", "older"), [("a", " b", False), ("#version", "b", False), ("a", "b", False), ("a", "b", True)]
)
def test_merges_that_lines_cannot_say_stay_pairs(
    byte_level_spec: Callable[[], Spec], write_directory: Write, left: str, right: str, older: bool
) -> None:
    """A line is split at its space, and is a comment where it begins with #version."""
    spec = byte_level_spec()
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for content in (left, right, left + right):
        vocab.setdefault(content, len(vocab) + len(spec["added_tokens"]))
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges] + [[left, right]]
    spec["model"]["merges"] = list(map(" ".join, pairs)) if older else pairs
    tokenizer = Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))
    state = json.loads(tokenizer._backend._encoder.to_str())  # type: ignore[attr-defined]
    assert [left, right] in state["model"]["merges"]


def check_encoder(spec: Spec) -> None:
    ours = _encoder(spec | {"model": spec["model"] | {"merges": _pairs(spec["model"]["merges"])}})
    theirs = RustTokenizer.from_str(json.dumps(spec))
    assert json.loads(ours.to_str()) == json.loads(theirs.to_str())
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.slow
def test_the_encoder_of_a_real_file_is_the_one_that_the_library_reads(llama3_files: Any) -> None:
    check_encoder(json.loads(llama3_files.json.read_text()))


def test_the_encoder_is_the_one_that_the_library_reads(
    byte_level_spec: Callable[[], Spec], llama_2_spec: Callable[[], Spec]
) -> None:
    settings = {"byte_fallback": True, "fuse_unk": True, "ignore_merges": True, "dropout": 0.25}
    unusual = with_added(byte_level_spec(), "    ", "<x>", lstrip=True, special=True)
    unusual["model"] |= settings | {"continuing_subword_prefix": "##", "unk_token": "<x>"}
    unusual["model"]["merges"] = []
    for spec in (byte_level_spec(), llama_2_spec(), unusual):
        check_encoder(spec)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda model: model["merges"].append("h e"), "its merges are neither pairs of tokens nor lines of two"),
        (lambda model: model["merges"].append(["h"]), "reading .* failed"),
        (lambda model: model["merges"].append(["h", "e", "y"]), "reading .* failed"),
        (lambda model: model["merges"].append(["h", 1]), "is not a known form of tokenizer.json"),
        (lambda model: model["merges"].append(["nowhere", "found"]), "Token `nowhere` out of vocabulary"),
        (lambda model: model["vocab"].update(h=True), "has an id that is a bool, not a whole number"),
        (lambda model: model["vocab"].update(h=1.0), "has an id that is a float, not a whole number"),
        (lambda model: model["vocab"].update(h=-1), "reading .* failed"),
        (lambda model: model.update(fuse_unk="yes"), "reading .* failed"),
        (lambda model: model.pop("merges"), "reading .* failed"),
    ],
)
def test_a_model_that_the_library_refuses_is_refused(
    byte_level_spec: Callable[[], Spec], write_directory: Write, change: Callable[[Spec], Any], fault: str
) -> None:
    spec = byte_level_spec()
    spec["model"]["merges"] = [
        merge if isinstance(merge, list) else merge.split(" ") for merge in spec["model"]["merges"]
    ]
    change(spec["model"])
    with pytest.raises(TokenizerError, match=fault):
        Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))


def test_added_text_is_still_matched(byte_level_spec: Callable[[], Spec], write_directory: Write) -> None:
    spec = with_added(byte_level_spec(), "    ", "covid", "日", "õ")  # õ is the model's own name for the byte F5
    path = write_directory({"tokenizer.json": spec})
    ours, theirs = Tokenizer.from_pretrained(path), PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    text = "a    b covid19 日"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert {token["id"] for token in spec["added_tokens"][-4:-1]} <= set(ids)
    assert ours.decode(ids) == theirs.decode(ids) == text
    for id in range(ours.vocab_size):
        assert ours.decode([id]) == theirs.decode([id], skip_special_tokens=True)


def test_a_name_like_a_mask_is_text_too(llama3: Any) -> None:
    ours, _ = llama3
    text = "\ue0000123456789abcdef0123456789abcdef.9\ue000"
    assert ours.decode(ours.encode(text)) == text
    assert max(ours.encode(text)) < 128_000


@pytest.mark.parametrize("char", ["a", " ", *(pytest.param(char, marks=pytest.mark.slow) for char in "^\né")])
def test_a_million_characters_in_a_row(llama3: Any, char: str) -> None:
    started = time.process_time()
    ids = llama3[0].encode(char * 1_000_000)
    assert llama3[0].decode(ids) == char * 1_000_000
    assert time.process_time() - started < 30  # measured: 1.5 s; a quadratic way takes hours


def test_random_text_round_trips_without_control_tokens(llama3: Any) -> None:
    ours, theirs = llama3
    draw = random.Random(0)
    alphabet = "ab <|>_/eot_id\n\r\t0123é日🎉\u0301\u200d"
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randrange(60)))
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.pop("model"), "KeyError"),
        (lambda spec: spec.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "WordPiece"),
        (lambda spec: spec.update(decoder={"prefix": "##"}), "KeyError"),
        (lambda spec: spec["model"].update(type="Riddle"), "reading .* failed"),
        (lambda spec: spec["model"].update(merges=["x y z"]), "tokenizer.json"),
        (lambda spec: spec.update(added_tokens=[{"colour": 1}]), "KeyError"),
    ],
)
def test_a_broken_file_is_refused(
    byte_level_spec: Callable[[], Spec], write_directory: Write, change: Callable[[Spec], Any], message: str
) -> None:
    spec = copy.deepcopy(byte_level_spec())
    change(spec)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_pretrained(write_directory({"tokenizer.json": spec}))
    assert "tokenizer.json" in str(caught.value)
