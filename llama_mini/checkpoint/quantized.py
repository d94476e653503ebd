"""Says by which method a checkpoint is quantised, and what to give instead. Only quantised GGUF files are read."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
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
    "AWQ": ("qweight", "qzeros"),
    "compressed-tensors": ("weight_packed", "weight_zero_point", "weight_shape"),
    "ModelOpt": ("weight_scale_2",),
    "FP8": ("weight_scale_inv", "weight_scale", "input_scale"),
    "MLX": ("scales", "biases"),
}
_METHOD_KEYS, _BITS_KEYS = ("quant_method", "quant_algo"), ("bits", "w_bit", "wbits", "nbits", "num_bits")
_FLAGS = {"load_in_4bit": 4, "load_in_8bit": 8}


def quantized(settings: Any, method: str = "") -> str:
    """The sentence that refuses a quantised checkpoint, with what its settings say; `method` if they name none."""
    entries = list(_entries(settings))
    stated = next((value for key, value in entries if key in _METHOD_KEYS and isinstance(value, str) and value), method)
    bits = next((value for key, value in entries if key in _BITS_KEYS and is_whole(value)), None)
    bits = bits or next((_FLAGS[key] for key, value in entries if key in _FLAGS and value is True), None)
    how = (f" by {stated:.40}" if stated else "") + (f" to {short_repr(bits)} bits" if bits else "")
    return (
        f"the checkpoint is quantised{how}; of quantised checkpoints, only GGUF files are read: give the original, in "
        "bfloat16 or float16, or a GGUF file"
    )


def check_not_quantized(path: Path, names: Collection[str], has_codes: bool) -> None:
    """Refuses tensors whose names, or a file beside them, tell that they are quantised.

    has_codes: whether a tensor is of a number format that weights cannot have.

    Raises CheckpointFormatError.
    """
    ends = {name.rpartition(".")[2] for name in names}
    method = next((method for method, added in _TENSORS.items() if not ends.isdisjoint(added)), "")
    if not method and not has_codes:
        return
    settings, directory = {}, path if path.is_dir() else path.parent
    for file in (inside(directory, name) for name in _FILES):
        if file.is_file():
            method = method or _FILES[file.name]
            with suppress(CheckpointError):  # a broken file only means that less is said
                settings = read_json(file)
    if method:
        raise CheckpointFormatError(f"{path}: {quantized(settings, method)}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested settings with its value, outer ones first."""
    if isinstance(value, Mapping):
        yield from value.items()
        for inner in value.values():
            yield from _entries(inner)
