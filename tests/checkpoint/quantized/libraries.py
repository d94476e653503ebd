"""Tiny checkpoints that compressed-tensors and bitsandbytes quantise and save themselves, on the CPU."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.helpers import generate_gparam
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from tests.checkpoint.quantized.writers import SIZES
from tests.tiny_families import random_model

NO_BIASES = {"attention_bias": False, "mlp_bias": False}
INT8_INPUTS = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
FP8_INPUTS = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)


def scheme(*targets: str, inputs: QuantizationArgs | None = None, **weights: Any) -> QuantizationScheme:
    """How compressed-tensors quantises the weights of these targets."""
    return QuantizationScheme(targets=list(targets), weights=QuantizationArgs(**weights), input_activations=inputs)


def quantise(weight: Tensor, how: QuantizationScheme) -> tuple[dict[str, Tensor], Tensor]:
    """One matrix as the library stores it, with the values that it dequantises."""
    state = {"weight": weight} | _scales(weight, how.weights)
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, how).value)
    stored = compressor.compress(state, how)
    return stored, compressor.decompress(stored, how)["weight"]


def save_compressed(
    directory: Path, groups: dict[str, QuantizationScheme], ignore: tuple[str, ...] = ("lm_head",), **changes: Any
) -> PreTrainedModel:
    """Writes a random model as llm-compressor does. Returns it with the weights that the library dequantises."""
    model = random_model("llama", 1, **SIZES | NO_BIASES | changes)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)), show_progress=False)
    for module in model.modules():
        if (how := getattr(module, "quantization_scheme", None)) is not None:
            for name, value in _scales(module.weight, how.weights).items():
                if hasattr(module, name):
                    getattr(module, name).data = value
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    compressor.decompress_model(model)
    return _plain(model.state_dict(), **changes)


def save_bitsandbytes(directory: Path, **settings: Any) -> PreTrainedModel:
    """Writes a random model as transformers does. Returns it with the weights that bitsandbytes dequantises.

    Its CPU kernel is wrong where a row is not of whole blocks, so each is.
    """
    sizes = {"intermediate_size": 128}
    random_model("llama", 1, **SIZES | NO_BIASES | sizes).bfloat16().save_pretrained(directory)
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(directory)
    values = {}
    for name, parameter in model.named_parameters():
        state = getattr(model.get_submodule(name.rpartition(".")[0]), "state", None)
        is_quantized = type(parameter).__name__ in ("Params4bit", "Int8Params")
        values[name] = dequantize_bnb_weight(parameter, state) if is_quantized else parameter
    return _plain(values, **sizes)


def _plain(values: dict[str, Tensor], **changes: Any) -> PreTrainedModel:
    model = random_model("llama", 1, **SIZES | NO_BIASES | changes)
    model.load_state_dict({name: values[name].float() for name in model.state_dict() if name in values}, strict=False)
    return model


def _scales(weight: Tensor, how: QuantizationArgs) -> dict[str, Tensor]:
    """Scales and zero points for the largest and smallest number of each block."""
    rows, columns = weight.shape
    down, across = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": tuple(how.block_structure or ()),
    }.get(how.strategy, (1, how.group_size))
    padded = F.pad(weight, (0, -columns % across, 0, -rows % down))
    blocks = padded.unflatten(1, (-1, across)).unflatten(0, (-1, down)).transpose(1, 2).flatten(2)
    found: dict[str, Tensor] = {}
    if how.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zero = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), how, global_scale=found.get("weight_global_scale")
    )
    grid = (math.ceil(rows / down), math.ceil(columns / across)) if how.strategy != "tensor" else (1,)
    return found | {"weight_scale": scale.reshape(grid), "weight_zero_point": zero.reshape(grid)}
