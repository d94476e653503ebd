"""Every family against transformers: random tiny configurations, gains and biases random, logits within 2e-5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_mini.checkpoint.families import FAMILIES, OWN
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointMismatchError
from llama_mini.model.llama import Llama
from llama_mini.model.norm import RMSNorm
from tests.tiny_families import logits, random_model
from tests.tiny_models import random_tokens

FIRST_FIVE = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
SEEDS = [
    pytest.param(name, seed, marks=[] if (seed < 4 if name in FIRST_FIVE else seed == 1) else pytest.mark.slow)
    for name in FAMILIES
    for seed in range(16)
]
LENGTH = 80


@pytest.mark.parametrize(("model_type", "seed"), SEEDS)
@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_logits_are_those_of_transformers(tmp_path: Path, model_type: str, seed: int) -> None:
    theirs = random_model(model_type, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = random_tokens(1, LENGTH, seed=seed)
    expected = logits(theirs, tokens)
    ours = Llama.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-5)

    # Saved again, in the spelling of v4, which v5 reads: by `convert` as the same family, else as the first that fits.
    if seed % 2:
        convert(tmp_path / "theirs", tmp_path / "ours")
    else:
        ours.save_pretrained(tmp_path / "ours")
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert raw["model_type"] == model_type if seed % 2 else raw["model_type"] != OWN
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(logits(again, tokens), expected, rtol=0, atol=2e-5)
    assert Llama.from_pretrained(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_heads_that_do_not_divide_the_width(tmp_path: Path, model_type: str) -> None:
    """As in a model of dim 1,792 with 24 heads of 128."""
    sizes = {"hidden_size": 56, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    theirs = random_model(model_type, 0, **sizes)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(1, LENGTH)
    torch.testing.assert_close(Llama.from_pretrained(tmp_path)(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("model_type", "seed"), [case for case in SEEDS if case.values[1] in (0, 3)])
def test_cached_equals_uncached_past_the_original_context(tmp_path: Path, model_type: str, seed: int) -> None:
    random_model(model_type, seed).save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path, dtype="float64")
    tokens = random_tokens(1, LENGTH, seed=seed)
    cache = model.new_cache(1, LENGTH)
    steps = [model(chunk, cache) for chunk in tokens.split([50, 1, 1, 7, 21], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("model_type", "plan", "cast"),
    [("llama", "pre", "early"), ("qwen3", "pre+qk", "early"), ("olmo2", "out+qk:full", "late")],
)
def test_norms_stand_where_the_family_has_them(tmp_path: Path, model_type: str, plan: str, cast: str) -> None:
    random_model(model_type, 1).save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path)
    found = {name: module for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    slots = {name.removeprefix("layers.0.") for name in found if name.startswith("layers.0.")}
    expected = {
        "pre": {"attention.pre_norm", "feed_forward.pre_norm"},
        "pre+qk": {"attention.pre_norm", "feed_forward.pre_norm", "attention.q_norm", "attention.k_norm"},
        "out+qk:full": {"attention.out_norm", "feed_forward.out_norm", "attention.q_norm", "attention.k_norm"},
    }
    assert slots == expected[plan]
    assert {module.cast for module in found.values()} == {cast}


def test_the_same_key_means_another_slot_in_another_family(tmp_path: Path) -> None:
    random_model("olmo2", 1).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "llama", "attention_bias": False}))
    with pytest.raises(CheckpointMismatchError, match=r"missing: model\.layers\.0\.input_layernorm\.weight"):
        Llama.from_pretrained(tmp_path)
