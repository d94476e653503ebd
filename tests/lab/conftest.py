"""What several test files read: the default checkpoint, and the text of its study."""

from pathlib import Path

import pytest

from llama_mini import Llama, Tokenizer
from llama_mini.lab.training import sample_text


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Llama:
    return Llama.from_pretrained(smollm2_dir, "float32")


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def alice(smollm2_tokenizer: Tokenizer) -> list[int]:
    """The first 256 tokens of the lab's text."""
    return smollm2_tokenizer.encode(sample_text())[:256]
