"""Small random models, ours and transformers', whose gains are never left at one."""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from llama_mini.model.config import LlamaConfig
from llama_mini.model.llama import Llama

Model = TypeVar("Model", Llama, LlamaForCausalLM)
TINY: dict[str, Any] = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "hidden_dim": 80,
    "vocab_size": 97,
    "max_seq_len": 128,
}
HF_TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    """A random Llama in eval mode, without gradients."""
    model = Llama(LlamaConfig(**TINY | changes)).to(dtype)
    return randomise(model, seed)


def hf_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random LlamaForCausalLM of transformers, float32, with the attention that is written out in it."""
    config = HFConfig(**HF_TINY | changes)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    return randomise(model, seed)


def randomise(model: Model, seed: int) -> Model:
    """Embedding N(0, 1), a tied one and matrices N(0, 1/fan_in), gains uniform in 0.5 to 1.5: logits are near one."""
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            values = rng.uniform(0.5, 1.5, parameter.shape)
        else:
            fan_in = 1 if "embed" in name and not model.config.tie_word_embeddings else parameter.shape[1]
            values = rng.standard_normal(parameter.shape) / np.sqrt(fan_in)
        parameter.data.copy_(torch.from_numpy(values))
    return model.eval().requires_grad_(False)


def random_tokens(batch: int, length: int, vocab_size: int = 97, seed: int = 5) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab_size, (batch, length)))
