"""MLX's affine quantisation (`quantization` in config.json, as mlx-lm writes it).

`weight` is (rows, columns · bits / 32), and `scales` and `biases` are (rows, groups): value = scale · code + bias.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, Tensors
from llama_mini.checkpoint.quantized.affine import Affine, affine_matrix, unpack
from llama_mini.checkpoint.quantized.weight import Parts, QuantizedMatrix, expect, modules, warn_of_unknown
from llama_mini.errors import ConfigError
from llama_mini.validate import short_repr

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def matrices(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of MLX. Raises CheckpointFormatError, ConfigError."""
    modes = [own.get("mode", "affine") for own in (settings, *settings.values()) if isinstance(own, Mapping)]
    if other := [mode for mode in modes if mode != "affine"]:  # these have no biases
        raise ConfigError(f"quantization.mode is {short_repr(other[0])}; only 'affine' is implemented")
    of_model = {key: value for key, value in settings.items() if not isinstance(value, Mapping | bool)}
    warn_of_unknown(of_model, ("bits", "group_size", "mode", "quant_method"))
    for module, parts in modules(tensors, ("weight", "scales", "biases")):
        own = settings.get(module)
        used = {**settings, **own} if isinstance(own, Mapping) else settings
        bits, group = (_setting(used, *known) for known in (("bits", 4, _BITS), ("group_size", 64, _GROUPS)))
        scales = parts["scales"]
        rows, n_groups = scales.shape if len(scales.shape) == 2 else (0, 0)
        columns = n_groups * group
        for part in (scales, parts["biases"]):
            expect(part, WEIGHTS, (rows, n_groups))
        expect(parts["weight"], ("U32",), (rows, columns * bits // 32))
        yield affine_matrix(
            module, (rows, columns), parts, "MLX", bits, group, partial(_decode, bits), by_rows=tuple(parts)
        )


def _setting(settings: Mapping[str, Any], key: str, default: int, known: tuple[int, ...]) -> int:
    value = settings.get(key, default)
    if isinstance(value, bool) or value not in known:
        raise ConfigError(f"quantization.{key} is {short_repr(value)}; MLX has {', '.join(map(str, known))}")
    return int(value)


def _decode(bits: int, parts: Parts, first: int, n: int) -> Affine:
    return Affine(unpack(parts["weight"], bits), parts["scales"].float(), parts["biases"].float())
