"""Adapters by hand, and logits with them. Importing PEFT takes seconds, so only test_merge does."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_mini.checkpoint.load import load_model
from llama_mini.checkpoint.open import open_checkpoint
from llama_mini.model.llama import Llama
from tests.tiny_models import random_tokens

TOKENS = random_tokens(2, 30, vocab_size=96)


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
