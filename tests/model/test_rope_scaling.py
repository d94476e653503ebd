"""Rules whose frequencies depend on the length of the text: which length counts, with a cache and without."""

import numpy as np
import pytest
import torch

from llama_mini.errors import ConfigError
from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama
from llama_mini.model.rope_scaling import DynamicScaling, LongRopeScaling, RopeScaling
from tests.tiny_models import TINY, random_tokens, tiny_model

ORIGINAL = 32
SHORT, LONG = (tuple(np.random.default_rng(9).uniform(1, most, 4).tolist()) for most in (2, 40))
LONGROPE = LongRopeScaling(short_factor=SHORT, long_factor=LONG, original_max_seq_len=ORIGINAL, attention_factor=1.2)
ONLY_LONG = LongRopeScaling(short_factor=LONG, long_factor=LONG, original_max_seq_len=ORIGINAL, attention_factor=1.2)
ONLY_SHORT = LongRopeScaling(short_factor=SHORT, long_factor=SHORT, original_max_seq_len=ORIGINAL, attention_factor=1.2)


def model(scaling: RopeScaling | None, max_seq_len: int = 128) -> Llama:
    return tiny_model(dtype=torch.float64, rope_scaling=scaling, max_seq_len=max_seq_len)


def cached(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    cache = model.new_cache(1, tokens.shape[1])
    return torch.cat([model(part, cache) for part in tokens.split([20, 1, 11, 1, 1, 30], dim=1)], dim=1)


def test_without_a_cache_the_text_decides() -> None:
    for length, expected in ((ORIGINAL, ONLY_SHORT), (ORIGINAL + 1, ONLY_LONG)):
        tokens = random_tokens(1, length)
        assert torch.equal(model(LONGROPE)(tokens), model(expected)(tokens))


@pytest.mark.parametrize(("max_seq_len", "expected"), [(ORIGINAL + 1, ONLY_LONG), (ORIGINAL, ONLY_SHORT)])
def test_with_a_cache_the_context_decides_from_the_first_token_on(max_seq_len: int, expected: RopeScaling) -> None:
    """A text that grows past the original context in its cache keeps one table (huggingface/transformers#33129)."""
    tokens = random_tokens(1, 64)
    steps = cached(model(LONGROPE, max_seq_len), tokens)
    torch.testing.assert_close(steps, model(expected, max_seq_len)(tokens), rtol=0, atol=1e-10)


def test_a_cache_of_dynamic_scaling_keeps_the_plain_table() -> None:
    tokens = random_tokens(1, 64)
    steps = cached(model(DynamicScaling(factor=4.0), max_seq_len=40), tokens)
    torch.testing.assert_close(steps, model(None)(tokens), rtol=0, atol=1e-10)


def test_dynamic_scaling_needs_two_pairs() -> None:
    """Its base is raised to the power d / (d - 2)."""
    assert LlamaConfig(**TINY | {"head_dim": 4, "rope_scaling": DynamicScaling(factor=2.0)}).rotary_dim == 4
    with pytest.raises(ConfigError, match="rope_scaling of type dynamic needs a rotary_dim of at least 4, not 2"):
        LlamaConfig(**TINY | {"head_dim": 2, "rope_scaling": DynamicScaling(factor=2.0)})


def test_both_tables_follow_the_model_to_another_device() -> None:
    with torch.device("meta"):
        on_meta = Llama(model(LONGROPE).config)
    rope, positions = on_meta.to_empty(device="cpu").rope, torch.arange(40)[None]
    for table, expected in zip(rope(positions), model(LONGROPE).rope(positions), strict=True):
        assert torch.equal(table, expected)
