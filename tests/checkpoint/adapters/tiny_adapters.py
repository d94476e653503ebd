"""Random tiny adapters, as PEFT and mlx-lm write them. No tensor is left at its initial zeros."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.model.llama import Llama
from tests.tiny_models import random_tokens

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = random_tokens(2, 30, vocab_size=96)


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


def ours(path: Path, adapter: Any = None) -> Tensor:
    """Logits in float32."""
    with torch.no_grad():
        return load_model(Llama, open_checkpoint(path, adapter=adapter), torch.float32, "cpu")(TOKENS)


def expect(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def write_adapter(directory: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """An adapter by hand: adapter_config.json and the file that it would have."""
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "adapter_model.safetensors" if "peft_type" in config else "adapters.safetensors"
    save_file({name: torch.as_tensor(values).contiguous() for name, values in tensors.items()}, directory / name)
    return directory
