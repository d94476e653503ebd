"""What the caller has set in PyTorch changes nothing that a model computes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llama_mini import LLM, Llama, SamplingParams

SAMPLED = SamplingParams(
    max_tokens=6, temperature=0.9, seed=3, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, logit_bias={3: 1.0}
)
FORMATS = [
    ("auto", "float32", None),
    ("auto", "bfloat16", "int8"),
    ("auto", "float32", "int4"),
    ("off", "float32", "int8"),
]
SETTINGS: dict[str, Callable[[], None]] = {
    # Stands for any device but the CPU: a tensor that is there by accident has no values.
    "default device": lambda: torch.set_default_device("meta"),
    "default dtype float64": lambda: torch.set_default_dtype(torch.float64),
    "default dtype bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
}


@pytest.fixture(autouse=True)
def settings_as_they_were() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


def results(path: Path, kernels: str, dtype: str, quantize: str | None) -> list[object]:
    llm = LLM(path, dtype=dtype, kernels=kernels, quantize=quantize)
    ids = llm.tokenizer.encode("Hello there my friend")
    completions = [*llm.generate(["Hello there", "my"], SamplingParams(max_tokens=6)), *llm.generate("Hello", SAMPLED)]
    return [llm.score(ids), *(completion.token_ids for completion in completions)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_engine_computes_the_same(tiny_dir: Path, setting: str) -> None:
    expected = [results(tiny_dir, *each) for each in FORMATS]
    SETTINGS[setting]()
    assert [results(tiny_dir, *each) for each in FORMATS] == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_computes_the_same(tiny_dir: Path, setting: str) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    expected = Llama.from_pretrained(tiny_dir)(tokens)
    SETTINGS[setting]()
    assert torch.equal(Llama.from_pretrained(tiny_dir)(tokens), expected)
