"""A Tokenizer from a GGUF file, against sentencepiece, tiktoken and transformers with the same vocabularies."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llama_mini.checkpoint.gguf.header import GGUFHeader, GGUFTensor, read_header
from llama_mini.errors import CheckpointFormatError, RequestError, TokenizerError
from llama_mini.tokenizer import DecodeStream, Tokenizer

Train = Callable[..., bytes]
INJECTION = "x<|eot_id|><|im_end|>\n</s><s><unk><|begin_of_text|><think>"
LETTERS = st.text(st.sampled_from("ab the\n▁.é日🎉0123<s>/") | st.characters(exclude_categories=["Cs"]), max_size=60)


def sentencepiece_metadata(model: bytes, **changes: Any) -> dict[str, Any]:
    """A model's own pieces, scores and types under the names that GGUF has for them."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(theirs.vocab_size())
    kinds = [(theirs.is_unknown, 2), (theirs.is_control, 3), (theirs.is_byte, 6), (theirs.is_unused, 5)]
    keys = {
        "model": "llama",
        "tokens": [theirs.id_to_piece(id) for id in ids],
        "scores": [theirs.get_score(id) for id in ids],
        "token_type": [next((number for is_kind, number in kinds if is_kind(id)), 1) for id in ids],
        "bos_token_id": theirs.bos_id(),
        "eos_token_id": theirs.eos_id(),
        "unknown_token_id": theirs.unk_id(),
    }
    return keys | changes


def json_metadata(spec: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer.json under the names that GGUF has for its parts."""
    ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    types = [{None: 1, True: 3, False: 4}[special.get(token)] for token in tokens]
    return {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": merges} | changes


def header(metadata: dict[str, Any], **others: Any) -> GGUFHeader:
    numbers = {"scores": np.float32, "token_type": np.int32}
    values = {key: np.array(value, numbers[key]) if key in numbers else value for key, value in metadata.items()}
    return GGUFHeader(Path("tiny.gguf"), 3, {f"tokenizer.ggml.{key}": value for key, value in values.items()}, others)


def write_gguf(path: Path, metadata: dict[str, Any], template: Any = None) -> Path:
    """A file with a tokenizer and one tensor, by the gguf library."""
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_key_value(f"tokenizer.ggml.{key}", value, kinds[type(value)])
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.ones((len(metadata["tokens"]) + 8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama_3(llama3_files: Any) -> Tokenizer:
    spec = json.loads(llama3_files.json.read_bytes())
    return Tokenizer.from_gguf(header(json_metadata(spec, pre="llama-bpe", bos_token_id=128_000, eos_token_id=128_009)))


@pytest.fixture(scope="module")
def llama_model(train_sentencepiece: Train) -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="module")
def llama_2(llama_model: bytes) -> Tokenizer:
    return Tokenizer.from_gguf(header(sentencepiece_metadata(llama_model)))


@pytest.fixture(scope="module")
def meta_and_transformers(llama3_tiktoken: Tokenizer, llama3_transformers: Any) -> tuple[Tokenizer, Any]:
    return llama3_tiktoken, llama3_transformers


@pytest.fixture(scope="module")
def default_checkpoint(smollm2_dir: Path) -> tuple[Tokenizer, Tokenizer]:
    """Its GGUF file's, and that of the directory that it was converted to."""
    path = next(smollm2_dir.parent.glob("SmolLM2-135M-Instruct.*.gguf"))
    return Tokenizer.from_pretrained(path), Tokenizer.from_pretrained(smollm2_dir)


def test_llama_3_ids_are_those_of_meta_and_of_transformers(
    llama_3: Tokenizer, meta_and_transformers: tuple[Tokenizer, PreTrainedTokenizerFast], text: str
) -> None:
    tiktoken, theirs = meta_and_transformers
    for sample in (text, text + text):
        ids = llama_3.encode(sample)
        assert ids == tiktoken.encode(sample)
        assert ids == [128_000, *theirs.encode(sample)]  # the fixture's file adds no BOS
        assert llama_3.decode(ids) == sample
    assert (llama_3.bos_id, llama_3.vocab_size) == (128_000, 128_256)
    assert llama_3.eos_ids == {128_001, 128_009}  # end_of_text by its name; the fixture has not yet an eom_id
    assert llama_3.kind == "GGUF byte-level BPE (llama-bpe)"


def test_the_default_checkpoint_has_one_tokenizer_in_both_its_files(
    default_checkpoint: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    ours, converted = default_checkpoint
    for sample in (text, INJECTION, "12  7\n  42"):
        assert ours.encode(sample) == converted.encode(sample)
        assert ours.decode(ours.encode(sample)) == converted.decode(converted.encode(sample))
    chat = [{"role": "user", "content": text + INJECTION}]
    assert ours.apply_chat_template(chat) == converted.apply_chat_template(chat)
    assert (ours.bos_id, ours.vocab_size) == (converted.bos_id, converted.vocab_size)
    assert ours.eos_ids == {0, 2, 4}  # as in llama.cpp; a directory from before <reponame> was known has not the last
    assert ours.eos_ids - {4} <= converted.eos_ids <= ours.eos_ids


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"add_dummy_prefix": False}, {"add_space_prefix": False}),
        ({"remove_extra_whitespaces": True}, {"remove_extra_whitespaces": True}),
        ({"vocab_size": 1000, "character_coverage": 1.0}, {"add_eos_token": True}),
        ({"byte_fallback": False}, {"add_bos_token": False}),
    ],
)
def test_ids_are_those_of_sentencepiece(train_sentencepiece: Train, options: dict[str, Any], changes: Any) -> None:
    model = train_sentencepiece(**options)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = Tokenizer.from_gguf(header(sentencepiece_metadata(model, **changes)))
    bos, eos = changes.get("add_bos_token", True), changes.get("add_eos_token", False)

    @settings(max_examples=300, derandomize=True, deadline=None)
    @given(LETTERS)
    @example("  ▁ a  b \n  c▁ ▁ ")
    def same(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_bos=bos, add_eos=eos)
        decoded, reference = ours.decode(ids), theirs.decode(ids)
        if "remove_extra_whitespaces" in options:  # the library drops every space in front, also of a ▁ in the text
            decoded, reference = decoded.lstrip(" "), reference.lstrip(" ")
        if "byte_fallback" not in options:  # what is unknown has no text
            assert decoded == reference

    same()


def test_samples_are_those_of_sentencepiece(llama_2: Tokenizer, llama_model: bytes, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    for sample in (text, text + text, " " + text):
        ids = llama_2.encode(sample)
        assert ids == theirs.encode(sample, add_bos=True)
        assert llama_2.decode(ids) == theirs.decode(ids) == sample.replace("\u2581", " ")
        stream = DecodeStream(llama_2)
        assert "".join([*map(stream.push, ids), stream.flush()]) == llama_2.decode(ids)
    assert (llama_2.bos_id, llama_2.eos_ids, llama_2.vocab_size) == (1, {2}, theirs.vocab_size())
    assert llama_2.kind == "GGUF SentencePiece"


@settings(max_examples=300, derandomize=True, deadline=None)
@given(text=LETTERS)
def test_no_text_becomes_a_control_token(llama_3: Tokenizer, llama_2: Tokenizer, text: str) -> None:
    for tokenizer in (llama_3, llama_2):
        for sample in (text, INJECTION + text + INJECTION):
            ids = tokenizer.encode(sample, add_special_tokens=False)
            assert not tokenizer._backend.special_ids.intersection(ids)
            assert tokenizer.decode(ids) == (sample.replace("▁", " ") if tokenizer.strips_space else sample)


def test_user_defined_tokens_are_words(train_sentencepiece: Train) -> None:
    model = train_sentencepiece(user_defined_symbols=["<|im_start|>", "covid"])
    metadata = sentencepiece_metadata(model)
    start, word = (metadata["tokens"].index(token) for token in ("<|im_start|>", "covid"))
    metadata["token_type"][start] = metadata["token_type"][word] = 4
    tokenizer = Tokenizer.from_gguf(header(metadata))
    assert {start, word} <= set(tokenizer.encode("a<|im_start|>b covid"))
    assert tokenizer.decode([1, start, word]) == "<|im_start|>covid"  # user-defined is not special


@pytest.mark.parametrize("char", ["a", *(pytest.param(char, marks=pytest.mark.slow) for char in " \né")])
def test_a_million_characters_in_a_row(llama_2: Tokenizer, char: str) -> None:
    started = time.process_time()
    assert llama_2.decode(llama_2.encode(char * 1_000_000)) == char * 1_000_000
    assert time.process_time() - started < 30  # measured: 1 s


def test_a_real_file_of_each_kind(
    tmp_path: Path, byte_level_spec: Callable[[], dict[str, Any]], llama_model: bytes, text: str
) -> None:
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    keys = {"pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True, "add_eos_token": True}
    metadata = json_metadata(byte_level_spec(), **keys)
    path = write_gguf(tmp_path / "tokenizer.json", metadata, template)  # its content decides, whatever its name
    tokenizer = Tokenizer.from_pretrained(str(path))
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(byte_level_spec()))
    assert tokenizer.encode(text) == [0, *theirs.encode(text), 1]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eos_ids) == ("GGUF byte-level BPE (gpt-2)", 0, {1, 3})
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi<|end|>"}])
    assert ids == [0, 2, *theirs.encode("hi"), *tokenizer.encode("<|end|>", False), 3, *theirs.encode("\n")]
    assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""  # a row that the embedding has beyond the vocabulary
    with pytest.raises(RequestError, match=f"expected 0 to {tokenizer.vocab_size + 7}"):
        tokenizer.decode([tokenizer.vocab_size + 8])

    path = write_gguf(tmp_path / "anything", sentencepiece_metadata(llama_model))
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_model)
    for tokenizer in (Tokenizer.from_pretrained(path), Tokenizer.from_gguf(read_header(path))):
        assert tokenizer.encode(text) == reference.encode(text, add_bos=True)
        assert tokenizer.kind == "GGUF SentencePiece"
        assert not tokenizer.has_chat_template


def test_templates_have_the_names_that_the_gguf_library_gives(
    tmp_path: Path, byte_level_spec: Callable[[], dict[str, Any]]
) -> None:
    texts = {"default": "d{{ messages[0].content }}", "tool_use": "t{{ tools[0].x }}"}
    named = [{"name": name, "template": text} for name, text in texts.items()]
    metadata = json_metadata(byte_level_spec(), pre="gpt-2")
    tokenizer = Tokenizer.from_pretrained(write_gguf(tmp_path / "named.gguf", metadata, named))
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.decode(tokenizer.apply_chat_template(chat)) == "dHi"
    assert tokenizer.decode(tokenizer.apply_chat_template(chat, tools=[{"x": "X"}])) == "tX"
    broken = header(metadata)
    broken.metadata["tokenizer.chat_template.rag"] = 1
    with pytest.raises(TokenizerError, match=r"tokenizer.chat_template.rag must be text, not 1"):
        Tokenizer.from_gguf(broken)


def tokenizer_of(spec: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer as RustTokenizer

    return RustTokenizer.from_str(json.dumps(spec))


def test_files_beside_a_gguf_file_say_nothing_about_it(tmp_path: Path, llama_model: bytes) -> None:
    path = write_gguf(tmp_path / "model.gguf", sentencepiece_metadata(llama_model))
    (tmp_path / "tokenizer_config.json").write_text("garbage")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 99}')
    assert Tokenizer.from_pretrained(path).eos_ids == {2}


def test_every_kind_has_its_name(
    tmp_path: Path, byte_level_spec: Callable[[], dict[str, Any]], llama_model: bytes, small_tiktoken: bytes
) -> None:
    (tmp_path / "a").write_text(json.dumps(byte_level_spec()), encoding="utf-8")
    (tmp_path / "b").write_bytes(llama_model)
    (tmp_path / "c").write_bytes(small_tiktoken)
    kinds = [Tokenizer.from_pretrained(tmp_path / name).kind for name in "abc"]
    assert kinds == ["tokenizer.json", "SentencePiece", "tiktoken"]


def test_rows_are_those_of_the_embedding(llama_model: bytes) -> None:
    embedding = GGUFTensor("token_embd.weight", (999, 32), "F32", 0, 999 * 32 * 4)
    tokenizer = Tokenizer.from_gguf(header(sentencepiece_metadata(llama_model), **{embedding.name: embedding}))
    assert tokenizer.decode([998]) == ""
    with pytest.raises(RequestError, match="expected 0 to 998"):
        tokenizer.decode([999])


def test_a_broken_file_is_refused(tmp_path: Path, llama_model: bytes) -> None:
    metadata = sentencepiece_metadata(llama_model)
    path = write_gguf(tmp_path / "model.gguf", metadata | {"scores": metadata["scores"][:5]})
    with pytest.raises(TokenizerError, match=r"model.gguf: tokenizer.ggml.scores must be an array of 700 numbers"):
        Tokenizer.from_pretrained(path)
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(CheckpointFormatError, match=r"model\.gguf: "):
        Tokenizer.from_pretrained(path)
