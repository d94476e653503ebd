"""Where the text of a GGUF model ends: at the ids where llama.cpp's ends (`llama_vocab_is_eog`)."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from llama_mini.errors import LlamaMiniWarning, TokenizerError
from llama_mini.tokenizer import Tokenizer
from tests.tokenizer import test_gguf_sentencepiece as sentencepiece
from tests.tokenizer.test_gguf_vocabulary import BYTES, header, vocabulary

CHAT = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
STATED = [*CHAT, "a1", "a2", "a3", "a4", "a5"]
OTHERS = ["<|end_of_turn|>", "<EOS>", "<|eos|>", "<file_sep>", "<|fim_suffix|>", "<|start_header_id|>", "</S>", " </s>"]
HARMONY = ["<|start|>", "<|end|>", "<|return|>", "<|call|>"]
NAMES = ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"]
NAMES += ["</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>"]
NAMES += ["<|return|>", "<|call|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]
NAMES += ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"]
# Tokens, their types, keys, and the ids where llama.cpp ends (llama-cpp-python 0.3.36).
CASES: dict[str, tuple[list[str], list[int] | None, dict[str, Any], list[int]]] = {
    "control": (CHAT, [3, 3, 3, 3], {}, [1, 3]),
    "user-defined": (CHAT, [3, 3, 4, 4], {}, [1, 3]),
    "normal": (CHAT, [3, 3, 1, 1], {}, [1, 3]),
    "unknown and unused": (CHAT, [3, 2, 1, 5], {}, [1, 3]),
    "no types": (CHAT, None, {}, [1, 3]),
    "an end beside it": (CHAT, [3, 3, 4, 4], {"eos_token_id": 3}, [1, 3]),
    "no ends": (["<s>", *OTHERS], [3] * 9, {"eos_token_id": 0}, [0]),
    "stated": (
        STATED,
        [3] * 9,
        {f"{name}_token_id": 4 + i for i, name in enumerate(["eot", "eom", "fim_pad", "fim_rep", "fim_sep"])},
        [1, 3, 4, 5, 6, 7, 8],
    ),
    "gpt-oss": (HARMONY, [3] * 4, {"eos_token_id": 2}, [2, 3]),
    "half of gpt-oss": (HARMONY[:3], [3] * 3, {"eos_token_id": 2}, [1, 2]),
    "ids outside": (CHAT, [3] * 4, {"eot_token_id": 2**32 - 1, "eom_token_id": 260}, [1, 3]),
    **{name: (["<s>", name], [3, 1], {"eos_token_id": 0}, [0, 1]) for name in NAMES},
}


def metadata(case: str) -> dict[str, Any]:
    tokens, types, keys, _ = CASES[case]
    found: dict[str, Any] = {"tokens": [*tokens, *BYTES.values()], "merges": [], "eos_token_id": 1, "bos_token_id": 0}
    found["token_type"] = None if types is None else np.array(types + [1] * len(BYTES), np.int32)
    return found | {"unknown_token_id": None, "padding_token_id": None} | keys


@pytest.mark.filterwarnings("ignore:.*token_type does not mark", "ignore:.*_token_id must be a token .*; ignored")
@pytest.mark.parametrize("case", CASES)
def test_a_text_ends_where_llama_cpps_does(case: str) -> None:
    assert sorted(vocabulary(**metadata(case)).eos_ids) == CASES[case][-1]


@pytest.mark.filterwarnings("ignore:.*token_type does not mark")
def test_a_byte_level_vocabulary_states_its_eos_first() -> None:
    assert vocabulary(**metadata("an end beside it")).eos_ids == [3, 1]


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("control", None),
        ("gpt-oss", None),
        ("user-defined", "<|im_end|>"),
        ("no types", "</s>, <|im_end|>"),
        ("<|file_sep|>", r"<\|file_sep\|>"),
    ],
)
def test_a_wrong_type_is_one_warning_and_the_token_becomes_control(case: str, names: str | None) -> None:
    sentence = "^tiny.gguf: tokenizer.ggml.token_type does not mark {} as control; read as if it did$"
    found = vocabulary(**metadata(case))
    with nullcontext() if names is None else pytest.warns(LlamaMiniWarning, match=sentence.format(names)) as caught:
        special = {token["content"] for token in found.tokenizer_json()["added_tokens"] if token["special"]}
        assert special >= {CASES[case][0][id] for id in found.eos_ids}
    assert caught is None or (len(caught) == 1 and caught[0].filename == __file__)


def test_text_never_becomes_it_and_decoding_leaves_it_out() -> None:
    with pytest.warns(LlamaMiniWarning, match="token_type does not mark"):
        found = Tokenizer.from_gguf(header(**metadata("normal")))
    assert found.eos_ids == {1, 3}
    assert found.encode("a<|im_end|>", parse_special=True)[1:] == [3]
    assert 3 not in found.encode("a<|im_end|>")
    assert found.decode([3]) == ""


def test_a_sentencepiece_vocabulary() -> None:
    user_defined = sentencepiece.vocabulary(**sentencepiece.with_token("<｜end▁of▁sentence｜>", 4))
    for found, ids in (
        (user_defined, [2, len(sentencepiece.TOKENS)]),
        (sentencepiece.vocabulary(token_type=None), [2]),
    ):
        with pytest.warns(LlamaMiniWarning, match="token_type does not mark"):
            assert found.eos_ids == ids


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    for id in (2**32 - 1, len(sentencepiece.TOKENS), -1):
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad"):
            key = f"{name}_token_id"
            sentence = f"^tiny.gguf: tokenizer.ggml.{key} must be a token from 0 to 270, not {id}; ignored$"
            found = sentencepiece.vocabulary(**{key: id})
            with pytest.warns(LlamaMiniWarning, match=sentence):
                config, ends = found.tokenizer_config(), found.eos_ids
            usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
            assert {name: config[name] for name in usual} == usual  # SentencePiece's, as in llama.cpp
            assert ends == [2]
    with pytest.raises(TokenizerError, match=r"eot_token_id must be a token from 0 to .*, not '2'"):
        _ = vocabulary(eot_token_id="2").eos_ids
