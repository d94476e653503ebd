"""The text part of models of images and text: its configuration, its tensors, and the logits of text alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from llama_mini.checkpoint.families import WHOLES
from llama_mini.checkpoint.hf.config import read_config
from llama_mini.errors import CheckpointMismatchError, ConfigError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from tests.tiny_families import logits, random_settings
from tests.tiny_models import random_tokens

TEXT = {"gemma3": "gemma3_text", "mistral3": "mistral", "llava_next": "mistral", "exaone4_5": "exaone4"}
TEXT |= {"lighton_ocr": "qwen3"}
TEXT |= dict.fromkeys(("internvl", "llava_onevision", "got_ocr2"), "qwen2")
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
USUAL = ("gemma3", "smolvlm")  # two ways to name the tensors; the others take longer to make


def random_whole(model_type: str) -> Any:
    text = TEXT.get(model_type, "llama")
    settings = random_settings(text, 1) | {"model_type": text, "pad_token_id": None, "tie_word_embeddings": False}
    settings |= {"final_logit_softcapping": None} if text == "gemma3_text" else {}
    config = AutoConfig.for_model(
        model_type, text_config=settings, vision_config=VISION, image_token_index=5, tie_word_embeddings=False
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name and text != "gemma3_text"
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + is_gain
    return model


@pytest.mark.parametrize("model_type", [w if w in USUAL else pytest.param(w, marks=pytest.mark.slow) for w in WHOLES])
def test_text_alone_has_the_logits_of_the_whole_model(tmp_path: Path, model_type: str) -> None:
    theirs = random_whole(model_type)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(1, 40, seed=1) % 80 + 6  # neither the image's token nor one beyond it
    with pytest.warns(LlamaMiniWarning, match=f"^of this model of type {model_type}, only the text .* vi") as caught:
        ours = Llama.from_pretrained(tmp_path)
    assert len([warning for warning in caught if warning.category is LlamaMiniWarning]) == 1
    torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)


def test_published_text_configs_leave_out_the_sizes_of_transformers_default(tmp_path: Path) -> None:
    """As that of gemma-3-4b-it, but for the lists."""
    text = {"hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    whole = {"model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "vision_config": VISION}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text}))
    with pytest.warns(LlamaMiniWarning, match="rms_norm_eps is absent; 1e-06"):
        config, raw = read_config(tmp_path)
    theirs: Any = AutoConfig.from_pretrained(tmp_path).text_config
    sizes = (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim, theirs.vocab_size)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size) == sizes
    sliding = tuple(i for i, kind in enumerate(theirs.layer_types) if kind == "sliding_attention")
    assert (config.sliding_layers, config.tie_word_embeddings) == (sliding, True)
    assert (config.rope_theta, config.sliding_rope_theta) == (1e6, 1e4)
    assert (config.eos_ids, raw["torch_dtype"]) == ((1, 106), "bfloat16")


def test_ids_of_the_whole_win_over_those_of_the_text_part(tmp_path: Path) -> None:
    """transformers v5 writes its defaults for the text part."""
    ids = {"eos_token_id": [1, 106], "bos_token_id": 2, "pad_token_id": 0}
    text = {"model_type": "gemma3_text", "eos_token_id": 1, "bos_token_id": 5, "rms_norm_eps": 1e-6}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, **ids)
    config.save_pretrained(tmp_path)
    ours, theirs = read_config(tmp_path)[0], GenerationConfig.from_model_config(config)
    assert list(ours.eos_ids) == theirs.eos_token_id == [1, 106]
    assert (ours.bos_id, ours.pad_id) == (theirs.bos_token_id, theirs.pad_token_id) == (2, 0)


def test_what_no_family_reads_is_refused_by_name(tmp_path: Path) -> None:
    whole = {"model_type": "gemma3", "text_config": {"model_type": "opt"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="model_type 'opt'; known: llama"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(whole | {"model_type": "paligemma", "vision_config": VISION}))
    with pytest.raises(ConfigError, match=r"vision_config is .*: this is a model of images and text"):
        read_config(tmp_path)


def test_a_text_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    model = random_whole("gemma3")
    del model.model.language_model.norm
    model.save_pretrained(tmp_path)
    with (
        pytest.warns(LlamaMiniWarning, match="only the text part"),
        pytest.raises(CheckpointMismatchError, match=r"1 missing: language_model\.model\.norm\.weight"),
    ):
        Llama.from_pretrained(tmp_path)
