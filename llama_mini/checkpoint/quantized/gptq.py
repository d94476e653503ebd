"""GPTQ (`quantization_config` or quantize_config.json), and AutoRound, which packs weights as GPTQ or AWQ do.

`qweight` is the transpose of the weight, packed along columns: (columns · bits / 32, rows). `scales` is (groups, rows);
`qzeros` holds the zero points, packed along rows. `g_idx` is the group of each column.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, SafetensorsTensor, Tensors
from llama_mini.checkpoint.quantized import awq
from llama_mini.checkpoint.quantized.affine import Affine, affine_matrix, unpack, unpack_some
from llama_mini.checkpoint.quantized.weight import Parts, QuantizedMatrix, expect, fault, modules, read_part, sizes_of
from llama_mini.errors import ConfigError
from llama_mini.validate import check_choice, check_flag, check_whole, is_whole, short_repr

_LAYOUTS = ("gptq", "gptq_v2")  # checkpoint_format; in the first, zero points are stored less one
_PACKINGS = {  # AutoRound's packing_format -> GPTQ's checkpoint_format, or AWQ
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq", "auto_gptq", "gptq"), "gptq"),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), "gptq_v2"),
    **dict.fromkeys(("auto_round:auto_awq", "auto_round:awq", "auto_awq", "awq"), "awq"),
}
_BITS = (2, 3, 4, 8)


def auto_round(settings: Mapping[str, Any], tensors: Tensors) -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of AutoRound. Raises CheckpointFormatError, ConfigError."""
    packing = settings.get("packing_format") or "auto_round:auto_gptq"
    check_choice("packing_format", packing, _PACKINGS, ConfigError)
    if settings.get("data_type", "int") != "int":
        raise ConfigError(f"data_type is {short_repr(settings['data_type'])}; only 'int' is implemented")
    layout = _PACKINGS[packing]
    if layout == "awq":
        return awq.matrices({**settings, "version": "gemm"}, tensors, "AutoRound")
    return matrices({**settings, "checkpoint_format": layout}, tensors, "AutoRound")


def matrices(settings: Mapping[str, Any], tensors: Tensors, method: str = "GPTQ") -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of GPTQ. Raises CheckpointFormatError, ConfigError."""
    awq.check_tools(settings, ("bits", "group_size", "is_marlin_format"), method)
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    check_choice("checkpoint_format", layout, _LAYOUTS, ConfigError)
    if settings.get("is_marlin_format"):
        raise ConfigError(f"is_marlin_format is true; the layouts that are read are {', '.join(_LAYOUTS)}")
    all_bits, sizes = _stated(settings, "bits", 4), _stated(settings, "group_size", 128)
    symmetric, reordered = _stated(settings, "sym", True), _stated(settings, "desc_act", False)
    if not is_whole(all_bits[0]) or all_bits[0] not in _BITS:
        raise ConfigError(f"bits is {short_repr(all_bits[0])}; those that are read are {', '.join(map(str, _BITS))}")
    if sizes[0] != -1:
        check_whole("group_size", sizes[0], ConfigError)
    check_flag("sym", symmetric[0], ConfigError)
    check_flag("desc_act", reordered[0], ConfigError)
    for module, parts in modules(tensors, ("qweight", "qzeros", "scales"), ("g_idx",)):
        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        (n_words, _), (_, n_zeros), (n_groups, rows) = sizes_of(qweight), sizes_of(qzeros), sizes_of(scales)
        bits = next((b for b in _BITS if b in all_bits and n_zeros * 32 == rows * b), all_bits[0])
        columns = n_words * 32 // bits
        known = [columns if size == -1 else size for size in sizes if is_whole(size) and (size > 0 or size == -1)]
        size = next((size for size in known if -(-columns // size) == n_groups), known[0])
        expect(scales, WEIGHTS, (-(-columns // size), rows))
        expect(qweight, ("I32", "U32"), (columns * bits // 32, rows))
        expect(qzeros, ("I32", "U32"), (n_groups, -(-rows * bits // 32)))
        if rows * bits % 32:
            raise fault(scales, f"is of {rows} rows, whose {bits} bits fill no whole words")
        if any(reordered) and "g_idx" not in parts and n_groups > 1:
            raise fault(qweight, f"needs {module}.g_idx, since desc_act is true")
        yield affine_matrix(
            module,
            (rows, columns),
            parts,
            method,
            bits,
            _group(parts.get("g_idx"), columns, size),
            partial(_decode, bits, layout == "gptq"),
            symmetric=all(symmetric),
        )


def _stated(settings: Mapping[str, Any], key: str, default: Any) -> list[Any]:
    """The values of a key, for the model and for single layers: the shapes of a layer's tensors tell which it has.

    The layers are named by regular expressions (GPTQModel's `dynamic`, AutoRound's `extra_config`). They come with the
    checkpoint, and one can take forever to match.
    """
    overrides = [settings[name] for name in ("dynamic", "extra_config") if isinstance(settings.get(name), Mapping)]
    layers = [layer for override in overrides for layer in override.values() if isinstance(layer, Mapping)]
    stated = [values[key] for values in (settings, *layers) if values.get(key) is not None]
    return stated if settings.get(key) is not None else [default, *stated]


def _group(g_idx: SafetensorsTensor | None, columns: int, size: int) -> int | Tensor:
    """The number of columns in a group, or the group of each column if they are in another order."""
    if g_idx is None:
        return size
    expect(g_idx, ("I32", "I64"), (columns,))
    stored, plain = read_part(g_idx).long(), torch.arange(columns) // size
    if torch.equal(stored, plain) or not stored.any():  # old files without the order hold zeros
        return size
    if not torch.equal(stored.sort().values, plain):
        raise fault(g_idx, f"does not put {columns} columns into groups of {size}")
    return stored


def _decode(bits: int, less_one: bool, parts: Parts, first: int, n: int) -> Affine:
    qzeros = parts["qzeros"]
    if less_one and bits != 3:  # added to whole words, since a zero point of 0 borrowed from its neighbour
        qzeros = qzeros + sum(1 << i for i in range(0, 32, bits))
    zeros = unpack_some(qzeros, bits, first, n)
    if less_one and bits == 3:
        zeros = zeros + 1 & 7
    scale = parts["scales"][:, first : first + n].T.float().contiguous()
    return Affine(unpack(parts["qweight"][:, first : first + n].T, bits), scale, -scale * zeros.T)
