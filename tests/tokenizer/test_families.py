"""Tokens that families add before a text and end it with, as tokenizer.json and generation_config.json state them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from llama_mini.tokenizer.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
FAMILIES: dict[str, tuple[list[str], list[str], dict[str, Any]]] = {  # prefix, ends, tokenizer_config.json
    "gemma": (
        ["<bos>"],
        ["<eos>", "<end_of_turn>"],
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "unk_token": "<unk>", "chat_template": TEMPLATE},
    ),
    "glm": (["[gMASK]", "<sop>"], ["<|endoftext|>", "<|user|>", "<|observation|>"], {}),
    "cohere": (
        ["<BOS_TOKEN>"],
        ["<|END_OF_TURN_TOKEN|>"],
        {"tokenizer_class": "CohereTokenizer", "bos_token": "<BOS_TOKEN>"},
    ),
    "phi": ([], ["<|endoftext|>", "<|end|>"], {"tokenizer_class": "GPT2Tokenizer"}),
}


def write(directory: Path, family: str) -> list[int]:
    """A tokenizer of single characters and bytes in the family's form; the ids of the tokens that end a text."""
    prefix, ends, config = FAMILIES[family]
    if family == "gemma":
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc\n", "▁a"]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        model = models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
        made = tokenizers.Tokenizer(model)
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in [*prefix, *ends, "<start_of_turn>"]])
    ids = {token: made.token_to_id(token) for token in [*prefix, *ends]}
    if prefix:
        special = [(token, ids[token]) for token in prefix]
        made.post_processor = processors.TemplateProcessing(single=[*prefix, "$A"], special_tokens=special)
    made.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config | {"eos_token": ends[0], "pad_token": ends[0]}
    generation = {"eos_token_id": [ids[token] for token in ends]}
    for name, content in {"tokenizer": config, "generation": generation}.items():
        (directory / f"{name}_config.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return generation["eos_token_id"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_and_ends_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    ends = write(tmp_path, family)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a b c a", " a  b", "héé\n\nc", "".join(FAMILIES[family][0]) + "a"):
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_ids == set(ends)


def test_gemmas_template_adds_bos_once(tmp_path: Path) -> None:
    write(tmp_path, "gemma")
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": " a b "}]
    ids = ours.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids.count(ids[0]) == 1
