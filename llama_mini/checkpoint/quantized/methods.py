"""Finds the method by which a safetensors checkpoint is quantised, and the matrices that its tensors make up."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_mini.checkpoint.io.files import CONFIG, QUANTIZATION_FILES, inside, read_json
from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, Tensors
from llama_mini.checkpoint.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mlx
from llama_mini.checkpoint.quantized.weight import QuantizedMatrix
from llama_mini.errors import CheckpointFormatError, ConfigError, warn
from llama_mini.validate import join_names, short_repr

Matrices = Callable[[Mapping[str, Any], Tensors], Iterator[QuantizedMatrix]]
_METHODS: dict[str, tuple[str, Matrices]] = {  # quant_method -> its name, and what reads it
    "gptq": ("GPTQ", gptq.matrices),
    "awq": ("AWQ", awq.matrices),
    "auto-round": ("AutoRound", gptq.auto_round),
    "mlx": ("MLX", mlx.matrices),
    "compressed-tensors": ("compressed-tensors", compressed_tensors.matrices),
    "fp8": ("FP8", fp8.matrices),
    "fbgemm-fp8": ("FBGEMM FP8", fp8.matrices),
    "modelopt": ("ModelOpt", fp8.modelopt),
    "bitsandbytes": ("bitsandbytes", bitsandbytes.matrices),
}
Stated = tuple[str, str, Mapping[str, Any]]  # where the settings are, the method, and the settings
SETTINGS = {  # keys of config.json, with the method of those that do not state it
    "quantization_config": "",
    "compression_config": "compressed-tensors",
    "quantization": "mlx",
}
_TENSORS = {  # method -> the ends of the names that it adds; the first method that has one
    "bitsandbytes": ("SCB", "absmax", "quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "gptq": ("g_idx",),
    "awq": ("qweight", "qzeros"),
    "compressed-tensors": ("weight_packed", "weight_zero_point", "weight_shape"),
    "modelopt": ("weight_scale_2",),
    "fp8": ("weight_scale_inv", "weight_scale", "input_scale"),
    "mlx": ("scales", "biases"),
}
_KNOWN = f"those of {', '.join(name for name, _ in _METHODS.values())} and GGUF files are read"
_DO = f"of quantised checkpoints, {_KNOWN}: give one of these, or the original in bfloat16 or float16"


def quantized_matrices(directory: Path, raw: Mapping[str, Any], tensors: Tensors) -> dict[str, QuantizedMatrix]:
    """The quantised matrices of a checkpoint by name; other tensors are plain. raw: config.json.

    Raises:
        ConfigError: the settings of config.json, or of a file beside it, name an unknown method or have unknown values.
        CheckpointFormatError: the tensors are not those that the method writes, or those of another method.
    """
    told = _told_by(tensors)
    stated = _stated(directory / CONFIG, raw, told[0] if told else "")
    if stated is None and (told or any(tensor.dtype not in WEIGHTS for tensor in tensors.values())):
        stated = _beside(directory)
    if stated is None:
        if told:
            raise CheckpointFormatError(
                f"{directory}: tensor {short_repr(told[1])} is quantised by {_title(told[0])}, but {CONFIG} has no "
                f"quantization_config that says how; restore it, or give another checkpoint"
            )
        return {}
    where, method, settings = stated
    if method not in _METHODS:
        raise ConfigError(f"{where} {f'is of {short_repr(method)}' if method else 'names no quant_method'}: {_DO}")
    title, read = _METHODS[method]
    try:
        found = {matrix.name: matrix for matrix in read(settings, tensors)}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not found and not told:
        warn(f"{where} names {title}, but no tensor is quantised: ignored")
    parts = {part.name for matrix in found.values() for part in matrix.parts.values()}
    if twice := sorted(name for name in found if name in tensors.keys() - parts):
        raise CheckpointFormatError(f"{directory} holds {join_names(twice)} both quantised and plain; remove one")
    if left := _told_by([name for name in tensors if name not in parts]):
        other, name = left
        raise CheckpointFormatError(
            f"{tensors[name].file}: tensor {short_repr(name)} is of {_title(other)}, but {where} names {title}; give a "
            "checkpoint of one method"
        )
    return found


def check_not_quantized(path: Path, names: Collection[str]) -> None:
    """Refuses tensors of a format other than safetensors whose names tell a method. Raises CheckpointFormatError."""
    if told := _told_by(dict.fromkeys(names)):
        raise CheckpointFormatError(
            f"{path}: {short_repr(told[1])} is quantised by {_title(told[0])}, which is read from Hugging Face's "
            "safetensors only: give these, or the original in bfloat16 or float16"
        )


def _told_by(names: Collection[str]) -> tuple[str, str] | None:
    """The method that the names of tensors tell, and the first such name."""
    ends = {name.rpartition(".")[2]: name for name in reversed(list(names))}
    return next(((method, ends[end]) for method, added in _TENSORS.items() for end in added if end in ends), None)


def _title(method: str) -> str:
    return _METHODS[method][0] if method in _METHODS else method


def _stated(path: Path, raw: Mapping[str, Any], told: str) -> Stated | None:
    """What config.json says; `told` is the method if it names none. Raises ConfigError."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}  # method -> where it is stated, and how
    inner = raw.get("text_config")
    for holder in (raw, inner if isinstance(inner, Mapping) else {}):
        for key, default in SETTINGS.items():
            if not (settings := holder.get(key)):
                continue
            where = f"{path}: {key}"
            if not isinstance(settings, Mapping):
                raise ConfigError(f"{where} must be an object, not {short_repr(settings)}; {_DO}")
            same = key == "quantization_config" and settings == holder.get("quantization")  # as mlx-lm writes it
            method = _method(settings) or ("mlx" if same else default) or told
            found.setdefault(method, (where, settings))
    if len(found) > 1:
        (one, (where, _)), (other, (there, _)) = list(found.items())[:2]
        raise ConfigError(f"{where} is of {_title(one)}, but {there.rpartition(' ')[2]} of {_title(other)}; remove one")
    if found:
        method, (where, settings) = found.popitem()
        return where, method, settings
    return None


def _beside(directory: Path) -> Stated | None:
    """What a file beside config.json says. Raises CheckpointError."""
    for name, method in QUANTIZATION_FILES.items():
        if (file := inside(directory, name)).is_file():
            settings = read_json(file)
            return str(file), _method(settings) or method, settings
    return None


def _method(settings: Mapping[str, Any]) -> str:
    """The method that settings name, in one spelling; empty if they name none."""
    if settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True:
        return "bitsandbytes"
    stated = settings.get("quant_method") or settings.get("method") or ("modelopt" if "producer" in settings else "")
    return str(stated).lower().replace("_", "-").removeprefix("intel/") if isinstance(stated, str) else repr(stated)
