"""Every pre-tokenizer that is known here splits texts as llama.cpp does, in linear time.

tests/golden/pre_tokenizers.json was recorded with llama-cpp-python 0.3.36. For each name, a GGUF file that has it as
tokenizer.ggml.pre, with TOKENS, MERGES, and <s> as last token and BOS, was opened by `Llama(path, vocab_only=True)`:

    ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
    golden["names"][name] = {
        "sha256": [digest(ids[start : start + 300]) for start in (0, 300, 600)],
        "add_bos": len(llama.tokenize(b"a", add_bos=True, special=False)) == 2,
    }
"""

import hashlib
import json
import random
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from llama_mini.tokenizer.pre_tokenizers import ADD_BOS, IGNORE_MERGES, PRE_TOKENIZERS
from llama_mini.tokenizer.tokenizer_json import BYTE_LETTERS, byte_level_parts

# Any two bytes are a token, so that nearly every change of a split changes the tokens; so are some whole words, which
# merges do not reach.
PAIRS = sorted(range(1 << 16), key=lambda pair: pair * 2_654_435_761 % (1 << 32))
MERGES = [(BYTE_LETTERS[pair >> 8], BYTE_LETTERS[pair & 255]) for pair in PAIRS]
TOKENS = [*BYTE_LETTERS, *map("".join, MERGES), "Hello", "Ġthe", "ĊĊĊ", "123", "camel", "camelCase"]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pre_tokenizers.json").read_text(encoding="utf-8"))


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    pools = GOLDEN["pools"]  # words, digits, white space, symbols, control characters
    made = []
    for _ in range(count):
        weights = [draw.random() for _ in pools[:-1]] + [0.3 * draw.random()]
        text = ""
        for _ in range(draw.randrange(1, 25)):
            part = draw.choice(draw.choices(pools, weights)[0])
            text += part if draw.random() < 0.7 else part[: draw.randrange(1, len(part) + 1)]
            text += " " if draw.random() < 0.3 else ""
        made.append(text)
    return made


def digest(ids: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


TEXTS = texts(900)
# Names with equal splits are tried once.
GROUPS: dict[str, list[str]] = {}
for _name, _steps in PRE_TOKENIZERS.items():
    GROUPS.setdefault(json.dumps([_steps, _name in IGNORE_MERGES]), []).append(_name)
RUNS = [*"aA1٣!天'\0\t\n \u3000\u0301", "aA", "éA", "1٣", " \n", " (", "a "]


@pytest.fixture(scope="module")
def encoder() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(TOKENS)}, merges=MERGES))


def set_up(encoder: Tokenizer, name: str) -> None:
    """Gives the encoder the parts that a GGUF file with this pre-tokenizer gets."""
    parts = byte_level_parts({}, [], PRE_TOKENIZERS[name], name in IGNORE_MERGES)
    shell = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **parts}))
    encoder.pre_tokenizer, encoder.decoder = shell.pre_tokenizer, shell.decoder
    encoder.model.ignore_merges = parts["model"].get("ignore_merges", False)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
@pytest.mark.parametrize("names", GROUPS.values(), ids=" ".join)
def test_ids_are_those_of_llama_cpp(encoder: Tokenizer, names: list[str], part: int) -> None:
    set_up(encoder, names[0])
    some = TEXTS[300 * part : 300 * part + 300]
    ids = [encoding.ids for encoding in encoder.encode_batch(some)]
    assert {GOLDEN["names"][name]["sha256"][part] for name in names} == {digest(ids)}
    assert encoder.decode_batch(ids) == some


def test_bos_is_added_where_llama_cpp_adds_it() -> None:
    assert {name: golden["add_bos"] for name, golden in GOLDEN["names"].items()} == {
        name: name in ADD_BOS for name in PRE_TOKENIZERS
    }


def check_time(encoder: Tokenizer, name: str, run: str) -> None:
    set_up(encoder, name)
    text = run * (30_000 // len(run)) + "½"
    started = time.process_time()
    encoder.encode(text)
    assert time.process_time() - started < 1  # measured: up to .2 s; a quadratic pattern takes 2.5 s or more


@pytest.mark.parametrize("run", ["1", " ", "A", "éA", "a "])
@pytest.mark.parametrize("name", ["superbpe", "deepseek-llm", "tekken"])
def test_patterns_that_look_far_ahead_take_linear_time(encoder: Tokenizer, name: str, run: str) -> None:
    check_time(encoder, name, run)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("names", GROUPS.values(), ids=" ".join)
def test_every_pattern_takes_linear_time(encoder: Tokenizer, names: list[str], run: str) -> None:
    check_time(encoder, names[0], run)
