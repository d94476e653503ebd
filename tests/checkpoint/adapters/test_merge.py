"""Logits with adapters merged are those of PEFT, whatever the options; the same for mlx-lm's own layers."""

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llama_mini.checkpoint.families import FAMILIES
from tests.checkpoint.adapters.tiny_adapters import ALL, TOKENS, adapted, expect, ours, save, saved_base
from tests.tiny_families import logits, random_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore:lm_head.weight differs", "ignore:.*differs from the embedding, so it is used"
)
OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {  # whether the base is tied, settings of LoraConfig
    "plain": (False, {"lora_alpha": 5}),
    "patterns": (
        False,
        {
            "use_rslora": True,
            "lora_alpha": 5,
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "up_proj|gate_proj": 9},
        },
    ),
    "some layers": (False, {"layers_to_transform": [1], "target_modules": ["v_proj", "up_proj"]}),
    "embedding and head": (False, {"target_modules": [*ALL, "embed_tokens", "lm_head"]}),
    "dora": (False, {"use_dora": True, "target_modules": [*ALL, "lm_head"]}),
    "dora of the embedding": (True, {"use_dora": True, "target_modules": ["embed_tokens", "o_proj"]}),
    "whole modules": (False, {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]}),
    "biases": (False, {"bias": "all", "target_modules": ["q_proj"]}),
    "tokens": (False, {"trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [4, 5, 96]}}),
    "tied, tokens": (True, {"trainable_token_indices": [3, 9, 1]}),
    "tied, embedding": (True, {"target_modules": ["embed_tokens"]}),
    "tied, head": (True, {"target_modules": ["lm_head"]}),
    "tied, both alike": (True, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied, whole embedding": (True, {"modules_to_save": ["embed_tokens"]}),
    "tied, whole both": (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, whole both alike": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("bases")
    settings = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}
    return {
        tied: saved_base(folder / str(tied), random_model("llama", 0, tie_word_embeddings=tied, **settings))
        for tied in (False, True)
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_peft(tmp_path: Path, base_of: dict[bool, Path], name: str) -> None:
    tied, settings = OPTIONS[name]
    theirs = adapted(base_of[tied], **settings)
    expected = logits(theirs, TOKENS)
    found = ours(save(theirs, tmp_path / "adapter"))  # the adapter names its model
    assert (expected - ours(base_of[tied])).abs().max() > 0.05
    expect(found, expected)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ("mistral", "olmo2") else pytest.mark.slow) for name in FAMILIES]
)
def test_families(tmp_path: Path, family: str) -> None:
    base = saved_base(tmp_path, random_model(family, 1))
    theirs = adapted(base, target_modules="all-linear", use_dora=True)
    expect(ours(base, save(theirs, tmp_path / "adapter")), logits(theirs, TOKENS))


def test_several_with_weights(tmp_path: Path, base_of: dict[bool, Path]) -> None:
    for name, settings in {"a": {"lora_alpha": 5}, "b": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}.items():
        save(adapted(base_of[False], seed=len(name), **settings), tmp_path / name)
    plain = AutoModelForCausalLM.from_pretrained(base_of[False], attn_implementation="eager")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    weights = {tmp_path / "a": 0.5, str(tmp_path / "b"): -2}
    expect(ours(base_of[False], weights), logits(theirs.eval(), TOKENS))
    theirs.base_model.set_adapter(["a", "b"])
    expect(ours(base_of[False], [tmp_path / "a", tmp_path / "b"]), logits(theirs.eval(), TOKENS))
    expect(ours(tmp_path / "a", tmp_path / "b"), logits(theirs, TOKENS))
