"""FP8 with scales beside the weights, as DeepSeek, vLLM, FBGEMM and ModelOpt write it, and ModelOpt's NVFP4."""

from collections.abc import Iterator, Mapping
from typing import Any

from llama_mini.checkpoint.io.safetensors_header import Tensors
from llama_mini.checkpoint.quantized.scaled_floats import FP4, OF_ACTIVATIONS, check_block, float_matrix
from llama_mini.checkpoint.quantized.weight import (
    QuantizedMatrix,
    fault,
    modules,
    warn_of_activations,
    warn_of_cache,
    warn_of_unknown,
)
from llama_mini.errors import ConfigError
from llama_mini.validate import check_choice

_KEYS = (
    *("quant_method", "weight_block_size", "activation_sc", "modules_to_", "ignored_layers", "fmt", "scale_fmt"),
    *("dequantize", "expert_dtype", "kv_cache_scheme"),
)
_MODELOPT_KEYS = (
    *("quant_", "producer", "quantization", "kv_cache_", "group_size", "exclude_modules", "ignore", "config_groups"),
)
_SCALES = ("weight_scale_inv", "weight_scale")  # either multiplies the weight


def matrices(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of FP8 or FBGEMM. Raises CheckpointFormatError, ConfigError."""
    warn_of_unknown(settings, _KEYS)
    block = settings.get("weight_block_size")
    block = None if block is None else check_block("weight_block_size", block)
    warn_of_activations("FP8")
    warn_of_cache(settings)
    for module, parts in modules(tensors, ("weight",), (*_SCALES, *OF_ACTIVATIONS)):
        scales = [scale for scale in _SCALES if scale in parts]
        if len(scales) != 1:
            raise fault(parts["weight"], f"needs one of {' and '.join(_SCALES)}, but has {len(scales)}")
        yield float_matrix(module, parts, "FP8", block=block, scale=scales[0])


def modelopt(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of ModelOpt. Raises CheckpointFormatError, ConfigError."""
    inner = settings.get("quantization")  # in hf_quant_config.json
    settings = {**settings, **inner} if isinstance(inner, Mapping) else settings
    warn_of_unknown(settings, _MODELOPT_KEYS)
    method = settings.get("quant_algo")
    check_choice("quant_algo", method, ("FP8", "NVFP4"), ConfigError)
    warn_of_activations("ModelOpt")
    warn_of_cache(settings)
    whole = ["weight_scale_2"] if method == "NVFP4" else []  # a second scale, of the whole matrix
    for module, parts in modules(tensors, ("weight", "weight_scale", *whole), OF_ACTIVATIONS):
        if method == "FP8":
            yield float_matrix(module, parts, "ModelOpt FP8")
        else:
            adjust = lambda scales, parts: scales * parts["weight_scale_2"]  # noqa: E731
            yield float_matrix(module, parts, "ModelOpt NVFP4", FP4, (1, 16), adjust=adjust)
