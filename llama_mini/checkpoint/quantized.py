"""Says by which method a checkpoint is quantized, and what to give instead. Only quantized GGUF files are read."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.io.files import inside, read_json
from llama_mini.errors import CheckpointError, CheckpointFormatError
from llama_mini.validate import is_whole, short_repr

# Keys of config.json, with the method of those that do not state it.
SETTINGS = {"quantization_config": "", "compression_config": "compressed-tensors", "quantization": "MLX"}
_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
_TENSORS = {  # method -> the ends of the names that it adds; the first method that has one
    "bitsandbytes": ("SCB", "absmax", "quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "GPTQ": ("g_idx",),
    "EXL2": ("q_weight", "q_scale_max"),
    "EXL3": ("trellis", "suh", "svh"),
    "AWQ": ("qweight", "qzeros"),
    "compressed-tensors": ("weight_packed", "weight_zero_point", "weight_shape"),
    "ModelOpt": ("weight_scale_2",),
    "FP8": ("weight_scale_inv", "weight_scale", "input_scale"),
    "HQQ": ("W_q",),
    "AQLM": ("codebooks", "codes"),
    "QuIP#": ("Qidxs",),
    "MLX": ("scales", "biases"),
}
_METHOD_KEYS, _BITS_KEYS = ("quant_method", "quant_algo"), ("bits", "w_bit", "wbits", "nbits", "num_bits")
_FLAGS = {"load_in_4bit": 4, "load_in_8bit": 8}


def quantized(how: str) -> str:
    """The sentence that refuses a checkpoint which is quantized `how`: by a method, to a number of bits."""
    return (
        f"the checkpoint is quantized{how}; of quantized checkpoints, only GGUF files are read: give the original, in "
        "bfloat16 or float16, or a GGUF file"
    )


def how_quantized(settings: Any, method: str = "") -> str:
    """What settings say of it, such as " by gptq to 4 bits"; `method` if they name none."""
    entries = list(_entries(settings))
    stated = next((value for key, value in entries if key in _METHOD_KEYS and isinstance(value, str) and value), method)
    bits = next((value for key, value in entries if key in _BITS_KEYS and is_whole(value)), None)
    bits = bits or next((_FLAGS[key] for key, value in entries if key in _FLAGS and value is True), None)
    return (f" by {stated:.40}" if stated else "") + (f" to {short_repr(bits)} bits" if bits else "")


def check_not_quantized(path: Path, names: Collection[str], has_codes: bool) -> None:
    """Refuses tensors whose names, or a file beside them, tell that they are quantized.

    has_codes: whether a tensor is of a number format that weights cannot have.

    Raises CheckpointFormatError.
    """
    ends = {name.rpartition(".")[2] for name in names}
    method = next((method for method, added in _TENSORS.items() if not ends.isdisjoint(added)), "")
    if not method and not has_codes:
        return
    directory = path if path.is_dir() else path.parent
    for name, usual in _FILES.items():
        if (file := inside(directory, name)).is_file():
            try:
                how = how_quantized(read_json(file), method or usual)
            except CheckpointError:  # it would only say more
                how = how_quantized({}, method or usual)
            raise CheckpointFormatError(f"{path}: {quantized(how)}")
    if method:
        raise CheckpointFormatError(f"{path}: {quantized(how_quantized({}, method))}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested settings with its value, outer ones first."""
    if isinstance(value, Mapping):
        yield from value.items()
        for inner in value.values():
            yield from _entries(inner)
