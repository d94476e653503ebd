"""The tokenizer of a GGUF file: what it does to text, and every way in which its metadata can be wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_mini.checkpoint.gguf_file import GGUFHeader
from llama_mini.checkpoint.gguf_tokenizer import chat_template, tokenizer_config, tokenizer_json
from llama_mini.errors import TokenizerError

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


def tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(header(**changes))))


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
        assert tokenizer_config(header(**changes))["add_bos_token"] is False


def test_config_names_the_special_tokens() -> None:
    config = tokenizer_config(header(padding_token_id=None))
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<|im_start|>", "<|im_end|>", TOKENS[0])
    assert config["pad_token"] is None
    assert config["model_max_length"] == 128
    assert config["clean_up_tokenization_spaces"] is False


def test_chat_template_is_passed_on() -> None:
    found = header()
    assert chat_template(found) is None
    found.metadata["tokenizer.chat_template"] = "{{ messages }}\r\n"
    assert chat_template(found) == "{{ messages }}\r\n"
    found.metadata["tokenizer.chat_template"] = 7
    with pytest.raises(TokenizerError, match="chat_template must be text, not 7"):
        chat_template(found)


def types(first: int) -> np.ndarray:
    return np.array([first] + [1] * (len(TOKENS) - 1))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "llama"}, "model is llama; only gpt2"),
    "no model": ({"model": None}, "model is None; only gpt2"),
    "pre": ({"pre": "deepseek-coder"}, "pre is deepseek-coder, an unknown pre-tokenizer; known: smollm"),
    "no pre": ({"pre": None}, "pre is default, an unknown pre-tokenizer; known: smollm"),
    "pre of numbers": ({"pre": np.array([1])}, "unknown pre-tokenizer"),
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "tokens empty": ({"tokens": []}, "tokens is empty"),
    "tokens of numbers": ({"tokens": np.arange(9)}, "tokens must be an array of strings"),
    "token twice": ({"tokens": [*TOKENS[:-1], "he"]}, "tokens holds he twice"),
    "types too short": ({"token_type": np.ones(3, int)}, f"token_type must be an array of {len(TOKENS)} numbers"),
    "types of floats": ({"token_type": types(1) * 1.0}, "token_type must be an array"),
    "unknown type": ({"token_type": types(7)}, "token_type holds 7; 1 to 6"),
    "no merges": ({"merges": None}, "merges is missing"),
    "merge of one": ({"merges": ["the"]}, "merges holds the, which is not two tokens"),
    "merge of three": ({"merges": ["Ġ t he"]}, "merges holds Ġ t he, which is not two tokens"),
    "merge of none": ({"merges": [" t"]}, "which is not two tokens"),
    "unknown part": ({"merges": ["zz t"]}, "merges holds zz t, but zz is not in the vocabulary"),
    "unknown result": ({"merges": ["t he"]}, "merges holds t he, but the is not in the vocabulary"),
    "id outside": ({"bos_token_id": len(TOKENS)}, f"bos_token_id must be a token from 0 to {len(TOKENS) - 1}"),
    "id below": ({"eos_token_id": -1}, "eos_token_id must be a token"),
    "id no number": ({"padding_token_id": True}, "padding_token_id must be a token from .* not True"),
    "bos without id": ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token is true, but there is no"),
    "flag": ({"add_bos_token": 1}, "add_bos_token must be true or false, not 1"),
    "eos": ({"add_eos_token": True}, "add_eos_token is true; .* not implemented"),
    "space": ({"add_space_prefix": True}, "add_space_prefix is true"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_metadata_is_one_sentence(fault: str) -> None:
    changes, sentence = FAULTS[fault]
    with pytest.raises(TokenizerError, match=sentence) as caught:
        _ = tokenizer_json(header(**changes)), tokenizer_config(header(**changes))
    assert str(caught.value).startswith("tiny.gguf: tokenizer.ggml.")
