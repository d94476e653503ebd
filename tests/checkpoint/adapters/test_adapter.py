"""Spellings of an adapter's tensors, and what is wrong with a file: one sentence that names the tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.errors import CheckpointError, LlamaMiniWarning
from llama_mini.model.llama import Llama
from tests.checkpoint.adapters.tiny_adapters import TOKENS, expect, ours, write_adapter
from tests.tiny_families import logits, random_model

Made = tuple[Path, Path, Tensor]
MODEL = "base_model.model.model"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {"num_hidden_layers": 2, "tie_word_embeddings": False, "hidden_size": 16, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base, an adapter for it as PEFT names its tensors, and the logits of both, in float64 by the formulas."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(3)
    theirs = random_model("llama", 0, num_key_value_heads=2, head_dim=8, **SETTINGS)
    theirs.save_pretrained(folder / "base")
    saved: dict[str, Any] = {}
    for layer in (0, 1):
        for module in ("self_attn.q_proj", "mlp.up_proj"):
            weight = theirs.get_submodule(f"model.layers.{layer}.{module}").weight
            a, b = rng.standard_normal((3, weight.shape[1])) / 4, rng.standard_normal((weight.shape[0], 3)) / 2
            magnitude = rng.uniform(0.5, 2, weight.shape[0])
            new = weight.detach().double().numpy() + 4 / 3 * b @ a
            new *= (magnitude / np.linalg.norm(new, axis=1))[:, None]  # DoRA
            weight.data = torch.from_numpy(new).float()
            name = f"{MODEL}.layers.{layer}.{module}"
            saved |= {
                f"{name}.lora_A.weight": a,
                f"{name}.lora_B.weight": b,
                f"{name}.lora_magnitude_vector": magnitude,
            }
    embedding = theirs.model.embed_tokens.weight
    a, b = rng.standard_normal((3, 97)) / 2, rng.standard_normal((16, 3)) / 2
    whole = rng.standard_normal((97, 16))
    embedding.data = torch.from_numpy(whole + 4 / 3 * (b @ a).T).float()
    name = f"{MODEL}.embed_tokens"
    saved |= {f"{name}.base_layer.weight": whole, f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    tensors = {name: torch.from_numpy(values).float() for name, values in saved.items()}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 4, "use_dora": True, "base_model_name_or_path": "../base"}
    return folder / "base", write_adapter(folder / "adapter", config, tensors), logits(theirs, TOKENS)


def changed(made: Made, folder: Path, change: Callable[[dict[str, Any]], Any], **config: Any) -> Path:
    """A copy of the adapter with other tensors or another configuration."""
    tensors = load_file(made[1] / "adapter_model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = json.loads((made[1] / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def renamed(pattern: str, replacement: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(pattern, replacement)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (".lora_A.weight", ".lora_A.default.weight"),
        (".lora_B.weight", ".lora_B.my_adapter.weight"),
        (".lora_embedding_A", ".lora_embedding_A.default"),
        (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"),
        (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
        (".base_layer.", "."),
        (".base_layer.", ".modules_to_save.default."),
        (".base_layer.", ".modules_to_save."),
        ("base_model.model.", ""),
        ("base_model.model.model.", ""),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("layers.0.", "layers.0._fsdp_wrapped_module."),
    ],
)
def test_spellings(made: Made, tmp_path: Path, pattern: str, replacement: str) -> None:
    base, _, expected = made
    expect(ours(base, changed(made, tmp_path, renamed(pattern, replacement))), expected)


def test_more_tokens_than_the_model_has(made: Made, tmp_path: Path) -> None:
    base = made[0]
    added = torch.randn(3, 16)

    def grow(tensors: dict[str, Any]) -> None:
        for part in ("lora_embedding_A", "lora_embedding_B"):
            del tensors[f"base_model.model.model.embed_tokens.{part}"]
        weight = load_file(base / "model.safetensors")
        del tensors["base_model.model.model.embed_tokens.base_layer.weight"]
        for name in ("model.embed_tokens", "lm_head"):
            tensors[f"base_model.model.{name}.weight"] = torch.cat((weight[f"{name}.weight"], added))

    source = open_checkpoint(base, adapter=changed(made, tmp_path / "grown", grow))
    assert source.config.vocab_size == 100
    grown = load_model(Llama, source, torch.float32, "cpu")
    assert grown(TOKENS).shape == (*TOKENS.shape, 100)
    plain = changed(made, tmp_path / "plain", lambda tensors: grow(tensors) or shrink(tensors))
    torch.testing.assert_close(grown(TOKENS)[..., :97], ours(base, plain), rtol=0, atol=1e-6)


def shrink(tensors: dict[str, Any]) -> None:
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = tensors[f"base_model.model.{name}.weight"][:97].clone()


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: value})


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{Q}.lora_A.weight", torch.zeros(2, 16)), r"q_proj\.lora_A\.weight is \(2, 16\), but its rank .* be 3"),
        (put(f"{Q}.lora_A.weight", torch.zeros(3)), r"A\.weight is \(3,\), but its rank should be 3, as adapter_con"),
        (put(f"{Q}.lora_A.weight", torch.zeros(3, 24)), r"A\.weight is \(3, 24\), but .* needs \(3, 16\); .* give"),
        (put(f"{Q}.lora_B.weight", torch.zeros(12, 3)), r"B\.weight is \(12, 3\), but .* needs \(16, 3\); the adap"),
        (put(f"{Q}.lora_magnitude_vector", torch.ones(3)), r"lora_magnitude_vector is \(3,\), but .* needs \(16,\)"),
        (put(f"{Q}.lora_A.default.weight", torch.zeros(3, 16)), r"holds '.*lora_A.*' and '.*lora_A.*' for one weight"),
        (put(f"{Q}.lora_A.weight", torch.zeros(3, 16, dtype=torch.int8)), "q_proj.lora_A.weight' holds integers"),
        (without(f"{Q}.lora_B.weight"), r"q_proj\.lora_A\.weight, .*, but not both A and B of it; download it again"),
        (put(f"{MODEL}.layers.7.mlp.up_proj.bias", torch.zeros(3)), "changes weights .*layers.7.mlp.up_proj.bias; the"),
        (put(f"{MODEL}.vision_tower.layers.0.mlp.weight", torch.zeros(3)), "does not have: .*vision_tower"),
        (put("base_model.model.score.weight", torch.zeros(3, 16)), "does not have: base_model.model.score.weight"),
        (put(f"{MODEL}.norm.weight", torch.zeros(5)), r"norm\.weight is \(5,\), but .* needs \(16,\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    made: Made, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    adapter = changed(made, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(made[0], adapter=adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_nan_is_named(made: Made, tmp_path: Path, name: str, value: float) -> None:
    adapter = changed(made, tmp_path, lambda tensors: tensors[f"{Q}.{name}"][0].fill_(value))
    with pytest.raises(CheckpointError, match=rf"q_proj\.{name} holds NaN or infinity; download it again"):
        ours(made[0], adapter)


def test_files_that_are_cut_or_absent(made: Made, tmp_path: Path) -> None:
    adapter = changed(made, tmp_path, lambda tensors: None)
    content = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: the safetensors library refuses it"):
        open_checkpoint(made[0], adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json, but none of adapter_model\.safetensors"):
        open_checkpoint(made[0], adapter=adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json, so it is not an adapter of PEFT or"):
        open_checkpoint(made[0], adapter=adapter)


def test_what_is_replaced_takes_neither_weight_nor_second_adapter(made: Made, tmp_path: Path) -> None:
    base, adapter, _ = made  # PEFT saves an embedding with a LoRA as a whole too
    with pytest.raises(CheckpointError, match=r"replaces model\.embed_tokens\.weight, so its weight must be 1, not"):
        open_checkpoint(base, adapter={adapter: 0.5})
    second = changed(made, tmp_path, lambda tensors: None)
    with pytest.raises(CheckpointError, match=rf"{adapter} and {second} change model.embed_tokens.weight, and"):
        open_checkpoint(base, adapter=[adapter, second])


def test_patterns_without_effect_are_warned_of(made: Made, tmp_path: Path) -> None:
    adapter = changed(made, tmp_path, lambda tensors: None, alpha_pattern={"q_proj": 4, "k_proj": 2, "proj": 1})
    with pytest.warns(LlamaMiniWarning, match="alpha_pattern names k_proj, proj, which the adapter does not change"):
        open_checkpoint(made[0], adapter=adapter)
