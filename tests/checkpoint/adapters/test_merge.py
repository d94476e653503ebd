"""Logits with adapters merged are those of PEFT, whatever the options; the same for mlx-lm's own layers."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_mini.checkpoint.families import FAMILIES
from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.cli.convert import convert
from llama_mini.errors import CheckpointFormatError
from llama_mini.model.llama import Llama
from llama_mini.optimize.fuse import fuser
from tests.checkpoint.adapters.tiny_adapters import TOKENS, expect, ours, write_adapter
from tests.checkpoint.gguf.gguf_files import write_family
from tests.checkpoint.meta.test_directory import PARAMS, meta_tensors, model
from tests.tiny_families import logits, random_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore:.*differs from the embedding, so it is used"
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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


def saved_base(directory: Path, theirs: PreTrainedModel) -> Path:
    theirs.save_pretrained(directory / "base")
    return directory / "base"


def adapted(base: Path, seed: int = 0, **settings: Any) -> PeftModel:
    """The model of a directory with a random adapter. `settings` are those of LoraConfig."""
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(theirs, LoraConfig(**{"r": 3, "target_modules": ALL} | settings)).eval()
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        size = 0.3 / max(parameter.shape[-1:] or (1,)) ** 0.5
        if "lora_magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=noise) + 0.5
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=noise) * 2 * size
        elif parameter.requires_grad:  # whole modules, biases, tokens
            parameter.data += torch.randn(parameter.shape, generator=noise) * size
    return model


def save(model: PeftModel, directory: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):  # PEFT tells that it saves an embedding as a whole too
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("bases")
    settings = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}
    return {
        tied: saved_base(folder / str(tied), random_model("llama", 0, tie_word_embeddings=tied, **settings))
        for tied in (False, True)
    }


SLOW = ("plain", "some layers", "dora of the embedding", "tokens", "tied, head", "tied, both alike", "tied, whole both")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in OPTIONS])
def test_options_of_peft(tmp_path: Path, base_of: dict[bool, Path], name: str) -> None:
    tied, settings = OPTIONS[name]
    theirs = adapted(base_of[tied], **settings)
    expected = logits(theirs, TOKENS)
    found = ours(save(theirs, tmp_path / "adapter"))  # the adapter names its model
    assert (expected - ours(base_of[tied])).abs().max() > 0.05
    expect(found, expected)


DEFAULT = ("phi3", "glm", "olmo2")  # q, k and v in one tensor; rotary pairs side by side; norms elsewhere


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in DEFAULT else pytest.mark.slow) for f in FAMILIES])
def test_families(tmp_path: Path, family: str) -> None:
    base = saved_base(tmp_path, random_model(family, 1))
    theirs = adapted(base, target_modules="all-linear", use_dora=True)
    expect(ours(base, save(theirs, tmp_path / "adapter")), logits(theirs, TOKENS))


@pytest.mark.parametrize(("family", "module"), [("phi3", "qkv_proj"), ("glm", "q_proj")])
def test_whole_modules_of_other_rows(tmp_path: Path, family: str, module: str) -> None:
    """Tensors that are several of the model's, or whose rows have another order; also where the base is GGUF."""
    plain = random_model(family, 1)
    theirs = adapted(saved_base(tmp_path, plain), target_modules=["o_proj", "gate_up_proj"], modules_to_save=[module])
    adapter, expected = save(theirs, tmp_path / "adapter"), logits(theirs, TOKENS)
    expect(ours(adapter), expected)
    expect(ours(write_family(tmp_path / "model.gguf", plain), adapter), expected)


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


def test_bases_of_other_formats(tmp_path: Path) -> None:
    """llama.cpp's and Meta's files have rotary pairs side by side; the adapter follows the model of transformers."""
    plain = model()
    theirs = adapted(saved_base(tmp_path, plain), use_dora=True, modules_to_save=["lm_head", "k_proj"])
    adapter, expected = save(theirs, tmp_path / "adapter"), logits(theirs, TOKENS)
    expect(ours(write_family(tmp_path / "model.gguf", plain), adapter), expected)
    (tmp_path / "meta").mkdir()
    save_file(
        {name: tensor for name, (tensor, _) in meta_tensors(plain).items()},
        tmp_path / "meta" / "consolidated.safetensors",
    )
    (tmp_path / "meta" / "params.json").write_text(json.dumps(PARAMS))
    expect(ours(tmp_path / "meta", adapter), expected)


def test_a_quantised_base(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain = random_model("llama", 0, tie_word_embeddings=False, head_dim=16, **sizes)
    theirs = adapted(saved_base(tmp_path, plain), target_modules=["v_proj", "down_proj"])
    adapter = save(theirs, tmp_path / "adapter")
    gguf = write_family(tmp_path / "model.gguf", plain, Kind.Q4_1)
    base, merged = open_checkpoint(gguf), open_checkpoint(gguf, adapter=adapter)
    changed = {name for name in base.tensors if "attn_v" in name or "ffn_down" in name}
    for name, stored in merged.tensors.items():
        before = base.tensors[name].kept
        assert stored.kept == (before and "int8" if name in changed else before)
        assert stored.has_codes == (base.tensors[name].has_codes and name not in changed)
    deltas = {f"blk.{i}.attn_v.weight": theirs.base_model.model.model.layers[i].self_attn.v_proj for i in range(3)}
    for name, delta in deltas.items():
        before, after = (torch.cat([rows for *_, rows in s.read([name], torch.float32)]) for s in (base, merged))
        torch.testing.assert_close(after, before + delta.get_delta_weight("default"), rtol=0, atol=1e-6)
    floats, kept = (
        load_model(Llama, merged, torch.float32, "cpu", fuser("off"), quantize)(TOKENS) for quantize in ("none", "auto")
    )
    expect(floats, ours(gguf, adapter))
    assert 0 < (kept - floats).abs().mean() < 0.01 * floats.std()  # v and down are quantised again, to eight bits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_mlx_lm(tmp_path: Path, base_of: dict[bool, Path], tied: bool, dora: bool) -> None:
    """mlx-lm's own layers merge their weights into those of the model of transformers."""
    theirs = AutoModelForCausalLM.from_pretrained(base_of[tied], dtype=torch.float32, attn_implementation="eager")
    modules = dict(theirs.named_modules())
    names = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")] + ["model.embed_tokens"]
    mx.random.seed(3)
    saved = {}
    with mx.stream(mx.cpu):
        for name in names if tied else [*names, "lm_head"]:
            weight = mx.array(modules[name].weight.detach().numpy())
            is_embedding = name.endswith("embed_tokens")
            plain = mlx.nn.Embedding(*weight.shape) if is_embedding else mlx.nn.Linear(*weight.shape[::-1], bias=False)
            plain.weight = weight
            layers = (LoRAEmbedding, DoRAEmbedding) if is_embedding else (LoRALinear, DoRALinear)
            layer = layers[dora].from_base(plain, r=4, scale=1.5)
            layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape)
            parts = {"lora_a": layer.lora_a, "lora_b": layer.lora_b}
            if dora:
                layer.m = parts["m"] = layer.m * mx.random.uniform(0.5, 1.5, layer.m.shape)
            saved |= {f"{name}.{part}": np.array(values) for part, values in parts.items()}
            modules[name].weight.data = torch.from_numpy(np.array(layer.fuse().weight))
    settings = {"fine_tune_type": "dora" if dora else "lora", "lora_parameters": {"rank": 4, "scale": 1.5}}
    adapter = write_adapter(tmp_path / "adapter", settings | {"model": str(base_of[tied])}, saved)
    expect(ours(adapter), logits(theirs, TOKENS))


def test_whole_weights_of_mlx_lm(tmp_path: Path, base_of: dict[bool, Path]) -> None:
    new = {}
    theirs = AutoModelForCausalLM.from_pretrained(base_of[False], dtype=torch.float32, attn_implementation="eager")
    for name, parameter in theirs.named_parameters():
        if "layers.1" in name:
            parameter.data = new[name] = parameter.data * 1.5
    config = {"fine_tune_type": "full", "num_layers": 1, "iters": 100}
    adapter = write_adapter(tmp_path / "adapter", config, new)
    expect(ours(base_of[False], adapter), logits(theirs, TOKENS))


def test_bfloat16_is_rounded_once(tmp_path: Path, base_of: dict[bool, Path]) -> None:
    theirs = adapted(base_of[False], target_modules=["up_proj"])
    layer = theirs.base_model.model.model.layers[1].mlp.up_proj
    source = open_checkpoint(base_of[False], adapter=save(theirs, tmp_path / "adapter"))
    (found,) = (rows for *_, rows in source.read(["model.layers.1.mlp.up_proj.weight"], torch.bfloat16))
    expected = (layer.weight + layer.get_delta_weight("default")).to(torch.bfloat16)
    assert (found == expected).float().mean() > 0.99  # the sum of a product may round differently


@pytest.mark.filterwarnings("ignore:.* has no tokenizer")
def test_convert_writes_the_merged_model(tmp_path: Path, base_of: dict[bool, Path]) -> None:
    theirs = adapted(base_of[True], target_modules=["q_proj", "embed_tokens"])
    save(theirs, tmp_path / "adapter")
    convert(base_of[True], tmp_path / "merged", adapter=tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert not loaded.config.tie_word_embeddings
    expect(logits(loaded, TOKENS), logits(theirs, TOKENS))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    tensors = get_peft_model_state_dict(theirs)
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointFormatError, match=r"as a pickle, adapter_model\.bin, .* merge it once: llama-mini"):
        open_checkpoint(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "from pickle")
    expect(ours(tmp_path / "from pickle"), logits(theirs, TOKENS))
