"""AWQ (`quantization_config` or quant_config.json) in the layout `gemm`.

`qweight` is the transpose of the weight, packed along rows: (columns, rows / 8). `qzeros` holds the zero points, packed
in the same way: (groups, rows / 8). `scales` is (groups, rows).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, SafetensorsTensor
from llama_mini.checkpoint.quantized.affine import Affine, affine_matrix, unpack_some
from llama_mini.checkpoint.quantized.weight import Parts, QuantizedMatrix, expect, modules, sizes_of
from llama_mini.errors import ConfigError
from llama_mini.validate import check_whole, short_repr

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight rows is
_LAYOUTS = ("gemm", "exllama", "ipex")  # versions; the last two are kernels for files of the first
_BITS = 4


def matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, SafetensorsTensor], method: str = "AWQ"
) -> Iterator[QuantizedMatrix]:
    """The matrices of a checkpoint of AWQ. Raises CheckpointFormatError, ConfigError."""
    given = lambda *keys: next((settings[key] for key in keys if settings.get(key) is not None), None)  # noqa: E731
    layout, bits, size = (
        given("version", "checkpoint_format", "format"),
        given("bits", "w_bit"),
        given("group_size", "q_group_size"),
    )
    if str(layout or "gemm").lower() not in _LAYOUTS:
        raise ConfigError(f"version is {short_repr(layout)}; only the layout 'gemm' is implemented")
    if bits not in (None, _BITS):
        raise ConfigError(f"bits is {short_repr(bits)}; AWQ has {_BITS}")
    size = 128 if size is None else size
    if size != -1:
        check_whole("group_size", size, ConfigError)
    for module, parts in modules(tensors, ("qweight", "qzeros", "scales")):
        (columns, _), (_, rows) = sizes_of(parts["qweight"]), sizes_of(parts["scales"])
        group = columns if size < 1 else size
        n_groups = -(-columns // group)
        expect(parts["scales"], tuple(WEIGHTS), (n_groups, rows))
        for end, n in (("qweight", columns), ("qzeros", n_groups)):
            expect(parts[end], ("I32", "U32"), (n, -(-rows // 8)))
        yield affine_matrix(f"{module}.weight", (rows, columns), parts, method, _BITS, group, _decode)


def _decode(parts: Parts, first: int, n: int) -> Affine:
    codes, zeros = (unpack_some(parts[end], _BITS, first, n, _ORDER).T.contiguous() for end in ("qweight", "qzeros"))
    scale = parts["scales"][:, first : first + n].T.float().contiguous()
    return Affine(codes, scale, -scale * zeros)
