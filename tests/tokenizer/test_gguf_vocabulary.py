"""The tokenizer of a GGUF file: what it does to text, and every way in which its metadata can be wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.errors import LlamaMiniWarning, TokenizerError
from llama_mini.tokenizer.gguf_vocabulary import GGUFVocabulary
from llama_mini.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llama_mini.tokenizer.tokenizer_json import BYTE_LETTERS

BYTES = bytes_to_unicode()
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", *BYTES.values(), "Ġt", "he", "Ġthe", "12", "ĠĠ"]
TEXTS = [
    "the cat, the hat",
    "def f(x):\n    return x**2  # ½",
    "天空为什么是蓝色的？ なぜ？ 왜?",
    "🦙👩‍👩‍👧🇪🇺",
    "e\u0301 a\u0308\u0323 \u0e01\u0e33",
    "one\r\ntwo\r\n\r\n",
    "   \t  7 and 1234\n  42   ",
    "\0\x1b[0m\x7f",
    "",
]


def header(**changes: Any) -> GGUFHeader:
    """A header whose `tokenizer.ggml.` keys are sound but for `changes`; None leaves a key out."""
    keys = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": np.array([3, 3, 3, 4] + [1] * (len(TOKENS) - 4)),
        "merges": ["Ġ t", "h e", "Ġt he", "1 2", "Ġ Ġ"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    } | changes
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return GGUFHeader(Path("tiny.gguf"), 3, metadata | {"llama.context_length": 128}, {})


def vocabulary(**changes: Any) -> GGUFVocabulary:
    return GGUFVocabulary(header(**changes))


def tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(vocabulary(**changes).tokenizer_json()))


# A text in which the splits differ, and its tokens by llama.cpp itself (xllamacpp 2026.10.11549) for the vocabulary
# below, whose last token is a word that no merge makes.
SPLIT_TEXT = "ab 123 1234512 ab's aB'S  $ab!!\n\n   12 !!\n ½12 zab\nzab"
SPLIT_MERGES = ["1 2", "12 3", "3 4", "Ġ 1", "Ġ 12", "Ġ Ġ", "ĠĠ Ġ", "Ċ Ċ", "' s", "' S", "a b", "Ġ a", "Ġ ab", "! !"]
SPLIT_MERGES += ["Ġ !", "! Ċ", "$ a", "$ $", "Ġ $"]
SPLIT_TOKENS = [*TOKENS[:4], *BYTES.values(), *(merge.replace(" ", "") for merge in SPLIT_MERGES), "zab"]
UP_TO_3_DIGITS = "ab|Ġ|123|Ġ|123|4|5|1|2|Ġab|'s|Ġa|B|'S|Ġ|Ġ$|ab|!!|ĊĊ|ĠĠ|Ġ|12|Ġ|!!|Ċ|Ġ|Â|½|12|Ġ|z|ab|Ċ|z|ab"
WHOLE_WORD = "<|im_start|>|" + UP_TO_3_DIGITS.removesuffix("z|ab") + "zab"
ONE_DIGIT = "ab|Ġ|1|2|3|Ġ|1|2|3|4|5|1|2|Ġab|'s|Ġa|B|'S|Ġ|Ġ$|ab|!!|ĊĊ|ĠĠ|Ġ|1|2|Ġ|!!|Ċ|Ġ|Â|½|1|2|Ġ|z|ab|Ċ|z|ab"
GPT_2 = "ab|Ġ|123|Ġ|123|4|5|12|Ġab|'s|Ġa|B|'|S|Ġ|Ġ$|ab|!!|ĊĊ|ĠĠ|Ġ12|Ġ|!!|Ċ|Ġ|Â|½|12|Ġ|z|ab|Ċ|z|ab"
SPLITS = {
    "smollm": "ab|Ġ|1|2|3|Ġ|1|2|3|4|5|1|2|Ġab|'s|Ġa|B|'|S|Ġ|Ġ$|ab|!!|ĊĊ|ĠĠĠ|1|2|Ġ|!!|Ċ|Ġ|Â|½|1|2|Ġ|z|ab|Ċ|z|ab",
    "llama-bpe": WHOLE_WORD,
    "llama3": WHOLE_WORD,
    "llama-v3": WHOLE_WORD,
    "smaug-bpe": UP_TO_3_DIGITS,
    "dbrx": UP_TO_3_DIGITS,
    "qwen2": ONE_DIGIT,
    "deepseek-r1-qwen": ONE_DIGIT,
    "gpt-2": GPT_2,
    "olmo": GPT_2,
    "default": "ab|Ġ|123|Ġ|123|4|5|1|2|Ġab|'|s|Ġa|B|'|S|ĠĠ|$|ab|!!|ĊĊ|ĠĠ|Ġ|12|Ġ|!!|Ċ|Ġ|Â|½|12|Ġ|z|ab|Ċ|z|ab",
}


def test_the_letters_of_bytes_are_gpt_2s() -> None:
    assert dict(enumerate(BYTE_LETTERS)) == BYTES


@pytest.mark.parametrize("pre", SPLITS)
def test_words_are_split_as_llama_cpp_does(pre: str) -> None:
    types = np.array([3, 3, 3, 4] + [1] * (len(SPLIT_TOKENS) - 4))
    found = tokenizer(pre=pre, tokens=SPLIT_TOKENS, token_type=types, merges=SPLIT_MERGES)
    assert "|".join(found.encode(SPLIT_TEXT).tokens) == SPLITS[pre]
    assert found.decode(found.encode(SPLIT_TEXT).ids) == SPLIT_TEXT
    assert vocabulary(pre=pre).kind == f"GGUF byte-level BPE ({pre})"


def test_an_absent_pre_tokenizer_is_the_default_with_a_warning() -> None:
    with pytest.warns(LlamaMiniWarning, match=r"^tiny.gguf has no tokenizer.ggml.pre: "):
        found = vocabulary(pre=None).tokenizer_json()
    assert found == vocabulary(pre="default").tokenizer_json()
    assert vocabulary(pre=None).kind == "GGUF byte-level BPE (default)"


@pytest.mark.parametrize(("pre", "theirs"), [("qwen2", Qwen2Tokenizer), ("gpt-2", GPT2Tokenizer)])
def test_ids_are_those_of_transformers(pre: str, theirs: type) -> None:
    alice = (Path(__file__).parents[1] / "golden" / "alice.txt").read_text(encoding="utf-8")[:20_000]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # merges over words too
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"vocab_size": 900, "initial_alphabet": alphabet, "show_progress": False}
    lines = [line[i : i + 12] for line in [*alice.splitlines(), *TEXTS] for i in range(0, len(line), 5)]
    trained.train_from_iterator(lines, trainers.BpeTrainer(special_tokens=["<|endoftext|>"], **options))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = np.array([3] + [1] * (len(tokens) - 1))
    merges = [" ".join(merge) for merge in model["merges"]]
    ours = tokenizer(pre=pre, tokens=tokens, token_type=types, merges=merges)
    reference = theirs(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    for text in (*TEXTS, SPLIT_TEXT, alice):
        composed = text if pre == "gpt-2" else reference.backend_tokenizer.normalizer.normalize_str(text)
        ids = ours.encode(composed).ids  # Qwen2Tokenizer composes characters first, which llama.cpp does not
        assert ids == reference.encode(composed)
        assert ours.decode(ids) == composed


def test_merges_apply_in_order() -> None:
    assert tokenizer().encode("the the").tokens == ["t", "he", "Ġthe"]


def test_digits_are_split_one_by_one() -> None:
    assert tokenizer().encode("12  7").tokens == ["1", "2", "ĠĠ", "7"]  # without the split: 12, Ġ, Ġ7 or Ġ, 7
    assert tokenizer().encode("\n  42").tokens == ["Ċ", "ĠĠ", "4", "2"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(text: str) -> None:
    encoded = tokenizer().encode(text)
    assert tokenizer().decode(encoded.ids, skip_special_tokens=False) == text


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    ids = tokenizer().encode("<|im_start|>t<think>").ids
    assert ids == [1, TOKENS.index("t"), 3]
    assert tokenizer().decode(ids, skip_special_tokens=True) == "t<think>"


def test_bos_is_added_where_the_file_says_so() -> None:
    bos = tokenizer(add_bos_token=True)
    assert bos.encode("t").tokens == ["<|im_start|>", "t"]
    assert bos.encode("t", add_special_tokens=False).tokens == ["t"]
    assert bos.encode("t", "he").tokens == ["<|im_start|>", "t", "he"]
    for changes in ({}, {"add_bos_token": False}):
        assert tokenizer(**changes).encode("t").tokens == ["t"]
        assert vocabulary(**changes).tokenizer_config()["add_bos_token"] is False


def test_bos_is_added_by_default_where_llama_cpp_does() -> None:
    for pre, changes, tokens in (
        ("llama-bpe", {}, ["<|im_start|>", "t"]),
        ("llama-bpe", {"add_bos_token": False}, ["t"]),
        ("smaug-bpe", {}, ["t"]),
        ("dbrx", {}, ["t"]),
    ):
        assert tokenizer(pre=pre, **changes).encode("t").tokens == tokens
        assert vocabulary(pre=pre, **changes).tokenizer_config()["add_bos_token"] == (len(tokens) == 2)


def test_eos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    for changes, tokens in (
        ({"add_eos_token": True}, ["t", "<|im_end|>"]),
        ({"add_eos_token": True, "add_bos_token": True}, ["<|im_start|>", "t", "<|im_end|>"]),
        ({"add_eos_token": False}, ["t"]),
    ):
        assert tokenizer(**changes).encode("t").tokens == tokens
        (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary(**changes).tokenizer_json()), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(vocabulary(**changes).tokenizer_config()))
        theirs = AutoTokenizer.from_pretrained(tmp_path)  # it makes a post-processor of its own from the two flags
        assert theirs.convert_ids_to_tokens(theirs.encode("t")) == tokens


def test_unknown_and_unused_tokens_are_never_matched_as_text_nor_shown() -> None:
    changes = {"tokens": ["<unk>", *TOKENS[1:]], "token_type": np.array([2, 5, 3, 4] + [1] * (len(TOKENS) - 4))}
    added = {token["content"]: token["special"] for token in vocabulary(**changes).tokenizer_json()["added_tokens"]}
    assert added == {"<unk>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False}
    assert tokenizer(**changes).decode([0, 1, TOKENS.index("t")]) == "t"


def test_an_empty_token_gets_a_name() -> None:
    types = np.array([3, 3, 3, 4] + [1] * len(TOKENS[4:]) + [5, 5])
    found = vocabulary(tokens=[*TOKENS, "", ""], token_type=types).tokenizer_json()
    assert found["model"]["vocab"][f"[EMPTY_{len(TOKENS)}]"] == len(TOKENS)


def test_config_names_the_special_tokens() -> None:
    config = vocabulary(padding_token_id=None).tokenizer_config()
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<|im_start|>", "<|im_end|>", TOKENS[0])
    assert config["pad_token"] is None
    assert config["model_max_length"] == 128
    assert config["clean_up_tokenization_spaces"] is False


def test_context_length_is_that_of_the_architecture() -> None:
    found = header()
    found.metadata.update({"general.architecture": "qwen2", "qwen2.context_length": 64})
    assert GGUFVocabulary(found).tokenizer_config()["model_max_length"] == 64


def test_chat_template_is_passed_on() -> None:
    found = header()
    assert GGUFVocabulary(found).chat_templates == {}
    found.metadata["tokenizer.chat_template"] = "{{ messages }}\r\n"
    found.metadata["tokenizer.chat_template.rag"] = "{{ documents }}"
    expected = {"default": "{{ messages }}\r\n", "rag": "{{ documents }}"}
    assert GGUFVocabulary(found).chat_templates == expected
    found.metadata["tokenizer.chat_template"] = 7
    with pytest.raises(TokenizerError, match="chat_template must be text, not 7"):
        _ = GGUFVocabulary(found).chat_templates


def types(first: int) -> np.ndarray:
    return np.array([first] + [1] * (len(TOKENS) - 1))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "bert"}, "model is 'bert'; only gpt2, byte-level BPE, and llama, SentencePiece, can be read"),
    "no model": ({"model": None}, "model is None; only gpt2"),
    "model of numbers": ({"model": np.arange(99)}, "model is array.*; only gpt2"),
    "pre": ({"pre": "tekkan"}, "pre is 'tekkan', an unknown pre-tokenizer; known: gpt-2, .*, tekken, .*, default"),
    "long pre": ({"pre": "x" * 10**6}, r"pre is 'x{76}\.\.\., an unknown"),
    "pre of numbers": ({"pre": np.array([1])}, "unknown pre-tokenizer"),
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "tokens empty": ({"tokens": []}, "tokens is empty"),
    "tokens of numbers": ({"tokens": np.arange(9)}, "tokens must be an array of strings"),
    "token twice": ({"tokens": [*TOKENS[:-1], "he"]}, "tokens holds 'he' twice"),
    "types too short": ({"token_type": np.ones(3, int)}, f"token_type must be an array of {len(TOKENS)} numbers"),
    "types of floats": ({"token_type": types(1) * 1.0}, "token_type must be an array"),
    "unknown type": ({"token_type": types(7)}, "token_type holds 7; 1 to 6"),
    "no merges": ({"merges": None}, "merges is missing"),
    "merge of one": ({"merges": ["the"]}, "merges holds 'the', which is not two tokens"),
    "merge of three": ({"merges": ["Ġ t he"]}, "merges holds 'Ġ t he', which is not two tokens"),
    "merge of none": ({"merges": [" t"]}, "which is not two tokens"),
    "unknown part": ({"merges": ["zz t"]}, "merges holds 'zz t', which is not two tokens .* make a third"),
    "unknown result": ({"merges": ["t he"]}, "merges holds 't he', which is not two tokens .* make a third"),
    "id no number": ({"padding_token_id": True}, "padding_token_id must be a token from .* not True"),
    "bos without id": (
        {"add_bos_token": True, "bos_token_id": None},
        "add_bos_token is true or absent, but",
    ),
    "flag": ({"add_bos_token": 1}, "add_bos_token must be true or false, not 1"),
    "eos without id": ({"add_eos_token": True, "eos_token_id": None}, "add_eos_token is true or absent, but"),
    "default bos": ({"pre": "llama-bpe", "bos_token_id": None}, "add_bos_token is true or absent, but there is no bos"),
    "line break": ({"tokens": [*TOKENS[:-2], "a\n", "a\n"]}, r"tokens holds 'a\\n' twice"),
    "half a merge": ({"merges": ["Ġ "]}, "merges holds 'Ġ ', which is not two tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_metadata_is_one_sentence(fault: str) -> None:
    changes, sentence = FAULTS[fault]
    with pytest.raises(TokenizerError, match=sentence) as caught:
        _ = vocabulary(**changes).tokenizer_json(), vocabulary(**changes).tokenizer_config()
    assert str(caught.value).startswith("tiny.gguf: tokenizer.ggml.")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(", ".join(PRE_TOKENIZERS), "")) < 400
