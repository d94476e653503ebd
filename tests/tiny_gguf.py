"""A tiny random LLaMA, as transformers has it and as a GGUF file that the gguf library wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

N_HEADS, N_KV_HEADS = 4, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]  # the last never applies: digits are split
TOKENS = CONTROL + list(bytes_to_unicode().values()) + ["Ġt", "he", "Ġthe", "12"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\r\n{% endfor %}"
PARTS = {  # transformers' module -> the GGUF name's part
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a random model of transformers, its gains random too."""

    def make(tied: bool = True) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_KV_HEADS,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model

    return make


@pytest.fixture(scope="session")
def write_gguf(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., Path]:
    """Writes a model of `tiny_llama` as GGUF. `changes` are metadata: None leaves a key out."""

    def write(path: Path, changes: dict[str, Any] | None = None, tied: bool = True, quantised: bool = False) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (_metadata() | (changes or {})).items():
            if key == "general.architecture":  # the writer has set it
                writer.kv_data[0][key].value = value
            elif value is not None:
                writer.add_key_value(key, *_typed(value))
        for name, values in _tensors(tiny_llama(tied)).items():
            kind = gguf.GGMLQuantizationType.F32
            if quantised and values.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0 if "embd" in name else gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _metadata() -> dict[str, Any]:
    return {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": N_HEADS,
        "llama.attention.head_count_kv": N_KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100_000.0,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _typed(value: Any) -> tuple[Any, ...]:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        return value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType["INT32" if type(value[0]) is int else "STRING"]
    return value, gguf.GGUFValueType[kinds[type(value)]]


def _tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for i in range(model.config.num_hidden_layers):
        for module, part in PARTS.items():
            values = state[f"model.layers.{i}.{module}.weight"]
            heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}.get(part)
            if heads:  # the halves of a head, row by row in turns: first of the one, first of the other, ...
                values = np.concatenate(
                    [np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(values, heads)]
                )
            tensors[f"blk.{i}.{part}.weight"] = values
    return tensors
