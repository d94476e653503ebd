"""Checkpoints of compressed-tensors, as llm-compressor writes them: integers, FP8 or FP4, with scales for blocks.

`config_groups` says how the matrices are quantised that its `targets` name: by the name of their module, by a regular
expression after `re:`, or by the module's class. Which matrices are quantised at all, the tensors tell.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_mini.checkpoint.io.safetensors_header import SafetensorsTensor, Tensors
from llama_mini.checkpoint.quantized.affine import Affine, affine_matrix, unpack, unpack_some
from llama_mini.checkpoint.quantized.scaled_floats import (
    FP4,
    FP8,
    OF_ACTIVATIONS,
    Shape,
    check_block,
    describe,
    expect_grid,
    float_matrix,
    spread,
)
from llama_mini.checkpoint.quantized.weight import (
    Parts,
    QuantizedMatrix,
    expect,
    fault,
    modules,
    read_part,
    sizes_of,
    warn_of_activations,
    warn_of_cache,
    warn_of_unknown,
)
from llama_mini.errors import ConfigError
from llama_mini.validate import check_choice, check_flag, check_whole, compile_pattern, join_names, short_repr

_FORMATS = (
    *("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
)
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_OPTIONAL = ("weight", "weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")
_KEYS = (
    *("quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "sparsity_config", "transform_config"),
    *("quantization_status", "global_compression_ratio", "moe_sparsity_config", "version", "run_compressed"),
)
_WEIGHT_KEYS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer"),
)


class _Scheme(NamedTuple):
    """How a matrix is quantised. block: rows and columns that share a scale; None for all of them."""

    bits: int
    is_int: bool
    symmetric: bool
    block: tuple[int | None, int | None]
    has_factor: bool  # a second scale, of the whole matrix


def matrices(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of compressed-tensors. Raises CheckpointFormatError, ConfigError."""
    warn_of_unknown(settings, _KEYS)
    schemes = _schemes(settings)
    for module, parts in modules(tensors, ("weight_scale",), (*_OPTIONAL, *OF_ACTIVATIONS)):
        yield _matrix(module, parts, _scheme_of(module, schemes))


def _schemes(settings: Mapping[str, Any]) -> dict[str, _Scheme]:
    """Each target's scheme."""
    groups = settings.get("config_groups") or {}  # none where only the cache or the sparsity is stated
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ConfigError(f"config_groups must be an object of objects, not {short_repr(groups)}")
    for part in (settings, *groups.values()):
        if part.get("format") is not None:
            check_choice("format", part["format"], _FORMATS, ConfigError)
    for key in ("sparsity_config", "transform_config"):
        value = settings.get(key) or {}
        if not isinstance(value, Mapping) or value.get("format", "") != ("dense" if value else ""):
            raise ConfigError(f"{key} is {short_repr(value)}; only checkpoints without it can be read")
    if any(group.get("input_activations") for group in groups.values()):
        warn_of_activations("compressed-tensors")
    warn_of_cache(settings)
    schemes: dict[str, _Scheme] = {}
    for name, group in groups.items():
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ConfigError(f"{name}.targets must be a list of names, not {short_repr(targets)}")
        if group.get("weights") is not None:
            schemes |= dict.fromkeys(targets, _scheme(f"{name}.weights", group["weights"]))
    return schemes


def _scheme(where: str, weights: Any) -> _Scheme:
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where} must be an object, not {short_repr(weights)}")
    warn_of_unknown(weights, _WEIGHT_KEYS)
    settings = {"num_bits": 8, "type": "int", "symmetric": True} | {k: v for k, v in weights.items() if v is not None}
    bits, kind, group = settings["num_bits"], settings["type"], settings.get("group_size")
    check_choice(f"{where}.type", kind, ("int", "float"), ConfigError)
    check_whole(f"{where}.num_bits", bits, ConfigError, 2, 8)
    if kind == "float" and bits not in (4, 8):
        raise ConfigError(f"{where}.num_bits must be 4 or 8 for floats, not {bits}")
    check_flag(f"{where}.symmetric", settings["symmetric"], ConfigError)
    strategy = settings.get("strategy", "tensor" if group is None else "channel" if group == -1 else "group")
    check_choice(f"{where}.strategy", strategy, _STRATEGIES, ConfigError)
    block: tuple[int | None, int | None] = {"tensor": (None, None), "channel": (1, None)}.get(strategy, (1, group))
    if strategy == "block":
        stated = settings.get("block_structure")
        if isinstance(stated, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", stated):  # as old versions wrote it
            stated = [*map(int, stated.split("x"))]
        block = check_block(f"{where}.block_structure", stated)
    elif strategy not in ("tensor", "channel"):
        check_whole(f"{where}.group_size", group, ConfigError)
    return _Scheme(bits, kind == "int", settings["symmetric"], block, strategy == "tensor_group")


def _scheme_of(module: str, schemes: Mapping[str, _Scheme]) -> _Scheme:
    """The scheme of the most specific target: a name, else a regular expression, else a class."""
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    for target in sorted(schemes, key=lambda target: (target == kind, target.startswith("re:"), target)):
        pattern = target.removeprefix("re:")
        if target in (module, kind) or (
            pattern != target and compile_pattern("targets", pattern, ConfigError, repetitions=4).match(module)
        ):
            return schemes[target]
    targets = join_names(map(short_repr, schemes))
    raise ConfigError(
        f"{short_repr(module)} is quantised, but none of the targets of config_groups names it: {targets}"
    )


def _matrix(module: str, parts: Tensors, scheme: _Scheme) -> QuantizedMatrix:
    weight = "weight" if "weight" in parts else "weight_packed"
    needed = [weight]
    needed += ["weight_shape"] if scheme.is_int and weight == "weight_packed" else []
    needed += ["weight_zero_point"] if not scheme.symmetric else []
    needed += ["weight_global_scale"] if scheme.has_factor else []
    if missing := [f"{module}.{part}" for part in needed if part not in parts]:
        raise fault(parts["weight_scale"], f"needs {join_names(missing)}, which no file holds")
    stored = parts[weight]
    rows, columns = sizes_of(stored)
    if weight == "weight_packed":
        columns = _stored_columns(parts["weight_shape"], rows) if scheme.is_int else 2 * columns
    shape, block = (rows, columns), (scheme.block[0] or rows, scheme.block[1] or columns)
    if scheme.block[0] == 1 and columns % block[1]:
        raise fault(stored, f"has {columns} columns, which are no whole groups of {block[1]}")
    if scheme.is_int:
        return _integer_matrix(module, parts, scheme, shape, block, weight)
    adjust = (lambda scales, parts: scales / parts["weight_global_scale"]) if "weight_global_scale" in parts else None
    dtypes = FP4 if scheme.bits == 4 else FP8
    return float_matrix(module, parts, f"compressed-tensors FP{scheme.bits}", dtypes, block, weight, adjust=adjust)


def _integer_matrix(
    module: str, parts: Tensors, scheme: _Scheme, shape: Shape, block: Shape, weight: str
) -> QuantizedMatrix:
    bits, (rows, columns), is_packed = scheme.bits, shape, weight == "weight_packed"
    middle = 1 << (bits - 1)  # I8 holds numbers that are less by this; it stands for zero where there is no zero point
    expect(parts[weight], ["I32" if is_packed else "I8"], (rows, _n_words(columns, bits) if is_packed else columns))
    parts = {**parts, "weight_scale": expect_grid(parts["weight_scale"], shape, block)}
    group: int | Tensor = block[1]
    n_groups = -(-columns // block[1])
    if (zeros := parts.get("weight_zero_point")) is not None and zeros.dtype == "I32":
        expect(zeros, ["I32"], (_n_words(rows, bits), n_groups))
    elif zeros is not None:
        expect_grid(zeros, shape, block, ["I8"])
    if (index := parts.get("weight_g_idx")) is not None:
        expect(index, ["I32", "I64"], (columns,))
        groups = read_part(index).long()
        if ((groups < 0) | (groups >= n_groups)).any():
            raise fault(index, f"holds numbers that are none of {n_groups} groups")
        if not torch.equal(groups, torch.arange(columns) // block[1]):
            group = groups

    def in_range(values: Tensor, part: str) -> Tensor:
        if bits < 8 and not ((values >= -middle) & (values < middle)).all():
            raise fault(parts[part], f"holds numbers beyond {bits} bits")
        return values

    def decode(values: Parts, first: int, n: int) -> Affine:
        numbers, zeros, zero = values[weight], values.get("weight_zero_point"), torch.tensor(float(middle))
        codes = (
            unpack(_whole_words(numbers, bits), bits)[:, :columns]
            if is_packed
            else in_range(numbers, weight).view(torch.uint8) + middle
        )
        if zeros is not None and zeros.dtype == torch.int32:  # packed down the columns
            zero = unpack_some(_whole_words(zeros.T, bits), bits, first, n).T.float()
        elif zeros is not None:
            zero = middle + spread(in_range(zeros, "weight_zero_point"), shape, block, first, n, block[1])
        scale = spread(values["weight_scale"], shape, block, first, n, block[1])
        return Affine(codes, scale, -zero * scale)

    matrix = affine_matrix(module, shape, parts, "compressed-tensors", bits, group, decode, zeros is None, (weight,))
    number_format = matrix.number_format.replace(f"groups of {columns}", describe(shape, block))
    return replace(matrix, number_format=number_format)


def _stored_columns(stored: SafetensorsTensor, rows: int) -> int:
    expect(stored, ["I64", "I32"], (2,))
    shape = read_part(stored).tolist()
    if shape[0] != rows or not 0 < shape[1] < 1 << 31:
        raise fault(stored, f"holds {shape}, but weight_packed has {rows} rows")
    return int(shape[1])


def _n_words(n: int, bits: int) -> int:
    """Words of 32 bits that n numbers take."""
    return -(-n * bits // 32)


def _whole_words(words: Tensor, bits: int) -> Tensor:
    """Words padded so that their bits are whole numbers."""
    return F.pad(words, (0, -words.shape[1] % bits))
