"""What people type who know transformers: it works, or one sentence says what to type."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from llama_mini import Tokenizer
from llama_mini.errors import RequestError


@pytest.fixture
def both(chat_spec: Callable[[], dict[str, Any]], write_directory: Callable[..., Path]) -> tuple[Tokenizer, Any]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    path = write_directory({"tokenizer.json": chat_spec(), "tokenizer_config.json": config | {"pad_token": "<|end|>"}})
    return Tokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_named_tokens_have_transformers_names(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 3, 1)
    assert len(ours) == len(theirs) == ours.vocab_size


@pytest.mark.parametrize("ids", [[5, 9, 602], (5, 9), [], 9, np.int64(9), np.array([5, 9]), np.array(9)])
def test_ids_of_any_kind_are_decoded(both: tuple[Tokenizer, Any], ids: Any) -> None:
    ours, theirs = both
    assert ours.decode(ids) == theirs.decode(ids if isinstance(ids, list | int) else np.array(ids).tolist())
    assert ours.decode(torch.tensor(np.array(ids), dtype=torch.int64)) == ours.decode(ids)


@pytest.mark.parametrize("ids", [[[5, 9]], torch.tensor([[5, 9]]), "hi", ["5"], None, 1.5])
def test_what_is_no_list_of_ids_is_refused(both: tuple[Tokenizer, Any], ids: Any) -> None:
    with pytest.raises(RequestError, match="expected a"):
        both[0].decode(ids)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batch_decode", r"a Tokenizer has no 'batch_decode': use \[tokenizer.decode\(ids\) for ids in batch\]"),
        ("convert_tokens_to_ids", "parse_special=True"),
        ("encod", "did you mean 'encode'?"),
        ("eos_tokens", "did you mean 'eos_token'?"),
        ("qqqq", "a Tokenizer has no 'qqqq'$"),
        ("__deepcopy__", "no '__deepcopy__'$"),
    ],
)
def test_other_names_say_what_to_use(both: tuple[Tokenizer, Any], name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=hint):
        getattr(both[0], name)


def test_a_tokenizer_is_not_called(both: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(RequestError, match=r"tokenizer.encode\(text\) gives the ids"):
        both[0]("hi", return_tensors="pt")
