"""Mistral's tekken.json against tiktoken with the same ranks, and every way in which the file can be wrong.

(Once by hand: the two files inside mistral-common 1.13.1, on 1,200 texts, against its Tekkenizer: equal ids.)
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from llama_mini.errors import TokenizerError
from llama_mini.tokenizer import DecodeStream, Tokenizer
from llama_mini.tokenizer.tokenizer_json import BYTE_LETTERS

Spec = dict[str, Any]
Open = Callable[..., Tokenizer]
# The pattern of every tekken.json so far.
_PREFIX, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERN = (
    rf"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL, N_VOCAB = 30, 500
LISTED = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"]


@pytest.fixture(scope="module")
def ranks(corpus: list[str]) -> list[bytes]:
    """Tokens of a small vocabulary, more than the model uses, as in Mistral's files."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=N_VOCAB + 100, initial_alphabet=alphabet, show_progress=False)
    )
    byte = {letter: value for value, letter in enumerate(BYTE_LETTERS)}
    vocab = tokenizer.get_vocab()
    learnt = [bytes(byte[letter] for letter in token) for token in sorted(vocab, key=vocab.__getitem__)]
    return [bytes([value]) for value in range(256)] + [token for token in learnt if len(token) > 1]


@pytest.fixture
def spec(ranks: list[bytes]) -> Spec:
    def encoded(token: bytes) -> str:
        return base64.b64encode(token).decode()

    config = {"default_vocab_size": N_SPECIAL + N_VOCAB, "default_num_special_tokens": N_SPECIAL}
    return {
        "config": config | {"pattern": PATTERN, "num_vocab_tokens": len(ranks), "version": "v13"},
        "vocab": [{"rank": i, "token_bytes": encoded(token), "token_str": None} for i, token in enumerate(ranks)],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(LISTED)],
        "image": {"image_patch_size": 14},
    }


@pytest.fixture
def opened(write_directory: Callable[[Spec], Path]) -> Open:
    return lambda spec, **others: Tokenizer.from_pretrained(write_directory({"tekken.json": spec, **others}))


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_ids_are_those_of_tiktoken_after_the_special_tokens(
    spec: Spec, opened: Open, ranks: list[bytes], corpus: list[str], version: str
) -> None:
    spec["config"]["version"] = version
    tokenizer = opened(spec)
    theirs = tiktoken.Encoding(
        "", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(ranks[:N_VOCAB])}, special_tokens={}
    )
    for text in [*corpus[:60], "", "HELLO World 123 Éa/\r\n  \n"]:
        ids = tokenizer.encode(text)
        assert ids == [1, *(N_SPECIAL + rank for rank in theirs.encode_ordinary(text))]
        assert tokenizer.decode(ids) == text
        stream = DecodeStream(tokenizer)
        assert "".join([*map(stream.push, ids), stream.flush()]) == text
    assert (tokenizer.kind, tokenizer.vocab_size) == ("tekken.json", N_SPECIAL + N_VOCAB)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


def test_control_tokens_come_from_templates_alone(spec: Spec, opened: Open) -> None:
    template = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    tokenizer = opened(spec, **{"chat_template.jinja": template})
    text = "</s>[INST]<SPECIAL_9>"
    assert min(tokenizer.encode(text, add_special_tokens=False)) >= N_SPECIAL
    assert tokenizer.encode(text, parse_special=True) == [1, 2, 3, 9]
    message = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}]) == [1, 3, *message, 4]
    assert tokenizer.decode([1, 3, N_SPECIAL + ord("a"), 9, 2]) == "a"
    assert tokenizer.decode([1, 5, 9], skip_special_tokens=False) == "<s>[THINK]<SPECIAL_9>"


@pytest.mark.parametrize("listed", [{}, {"special_tokens": None}])
def test_older_files_list_no_special_tokens(spec: Spec, opened: Open, listed: Spec) -> None:
    del spec["special_tokens"]
    spec["config"]["version"] = "v3"
    tokenizer = opened(spec | listed)
    names = {
        "[INST]": 3,
        "[TOOL_CALLS]": 9,
        "<pad>": 11,
        "[SYSTEM_PROMPT]": 17,
        "[TOOL_CONTENT]": 19,
        "<SPECIAL_20>": 20,
    }
    for name, id in names.items():  # mistral-common's Tekkenizer.DEPRECATED_SPECIAL_TOKENS
        assert tokenizer.decode([id], skip_special_tokens=False) == name


def test_tokenizer_json_comes_first_and_content_counts(
    spec: Spec, byte_level_spec: Callable[[], Spec], write_directory: Callable[[Spec], Path]
) -> None:
    path = write_directory({"tekken.json": spec, "tokenizer.json": byte_level_spec(), "tokenizer.model": b"\0"})
    assert Tokenizer.from_pretrained(path).kind == "tokenizer.json"
    (path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.from_pretrained(path).kind == "tekken.json"
    (path / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(path).kind == "tekken.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.pop("special_tokens"), "version 'v13' and no special_tokens; only v1, v2, v3, v7 may lack"),
        (lambda spec: spec["special_tokens"].pop(2), "its special_tokens do not have the ranks 0 to 5, at most 30"),
        (lambda spec: spec["special_tokens"][1].update(token_str="<bos>"), "its special_tokens lack <s>"),
        (lambda spec: spec["special_tokens"][5].update(token_str="</s>"), "a name that is repeated, empty or not text"),
        (lambda spec: spec["special_tokens"][5].update(token_str=""), "a name that is repeated, empty or not text"),
        (lambda spec: spec["special_tokens"][5].update(token_str=7), "a name that is repeated, empty or not text"),
        (lambda spec: spec.update(special_tokens=[1]), "not a known form of tekken.json"),
        (lambda spec: spec["vocab"][300].update(rank=301), "first 500 tokens do not have the ranks 0 to 499"),
        (lambda spec: spec["vocab"][300].update(token_bytes="AA=="), "first 500 tokens do not have the ranks"),
        (lambda spec: spec["vocab"][300].update(token_bytes="?"), r"token_bytes '\?' is not base64"),
        (lambda spec: spec["vocab"][7].update(token_bytes="AAAA"), "1 of the 256 single bytes are not tokens"),
        (lambda spec: spec["vocab"][7].pop("token_bytes"), r"not a known form of tekken.json \(KeyError"),
        (lambda spec: spec.update(vocab=spec["vocab"][:400]), "vocab has 400 tokens, but default_vocab_size needs 500"),
        (lambda spec: spec["config"].pop("pattern"), r"not a known form of tekken.json \(KeyError\('pattern'\)"),
        (lambda spec: spec["config"].update(pattern="("), "tiktoken failed"),
        (lambda spec: spec["config"].update(pattern=None), "tiktoken failed"),
        (
            lambda spec: spec["config"].pop("default_vocab_size"),
            "default_vocab_size must be a whole number of at least 286",
        ),
        (lambda spec: spec["config"].update(default_vocab_size=100), "default_vocab_size must be a whole number"),
        (lambda spec: spec["config"].update(default_num_special_tokens=10**9), "default_num_special_tokens must be a"),
    ],
)
def test_a_broken_file_is_one_sentence(spec: Spec, opened: Open, change: Callable[[Spec], Any], message: str) -> None:
    change(spec)
    with pytest.raises(TokenizerError, match=message) as caught:
        opened(spec)
    assert "tekken.json" in str(caught.value)
    assert len(str(caught.value)) < 400
