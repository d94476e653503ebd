"""A quantised matrix of a safetensors checkpoint, made of several tensors, and how these are checked and read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama_mini.checkpoint.io.safetensors_header import WEIGHTS, SafetensorsTensor, Tensors, changed, cut_rows, stamp_of
from llama_mini.checkpoint.source import QuantizedWeights, StoredTensor
from llama_mini.errors import CheckpointFormatError, warn
from llama_mini.machine import one_thread
from llama_mini.validate import join_names, short_repr, warn_unknown

_DTYPES = WEIGHTS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U32": torch.int32,  # packed codes: only their bits matter, and PyTorch computes little in uint32
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NOT_FINITE = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C, "F8_E8M0": 0xFF}  # the least bits of NaN or infinity, but for the sign
Parts = Mapping[str, Tensor]  # what the parts of a matrix hold, by the ends of their names
Decoded = TypeVar("Decoded", Tensor, QuantizedWeights)


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """A quantised matrix.

    name: of the weight in an unquantised file: "model.layers.0.self_attn.q_proj.weight".
    shape: (rows, columns) of the weight.
    parts: all tensors that it is made of, by the ends of their names: "qweight", "scales".
    number_format: the method, bits and groups, for people: "GPTQ 4 bits, groups of 128".
    kept: the narrowest of code_formats.FORMATS that loses none of its bits.
    floats: (parts, first row, n rows) -> (n, columns) float32.
    codes: the same as codes of the format `kept`; None if they must be requantised.
    order: the columns in the order of the codes, (columns,) int64, if that is another.
    by_rows: the parts that have a row for each row of the weight. Only the rows that are asked for are read and passed;
        other parts are passed whole.
    """

    name: str
    shape: tuple[int, int]
    parts: Tensors
    number_format: str
    kept: str
    floats: Callable[[Parts, int, int], Tensor]
    codes: Callable[[Parts, int, int], QuantizedWeights] | None = None
    order: Tensor | None = None
    by_rows: Collection[str] = ()
    share: float = 1.0  # of the bytes of its whole parts, if it is some of their rows

    def stored(self) -> StoredTensor:
        """As one tensor of a `Source`."""
        n_bytes = {end: part.end - part.begin for end, part in self.parts.items()}
        n = sum(n if end in self.by_rows else int(n * self.share) for end, n in n_bytes.items())
        file = next(iter(self.parts.values())).file
        return StoredTensor(file, self.shape, self.number_format, n, self.kept, self.codes is not None, self.order)


def cut_matrix(matrix: QuantizedMatrix, name: str, first: int, n: int) -> QuantizedMatrix:
    """`n` rows of a matrix from row `first` on, under another name."""
    floats, codes = matrix.floats, matrix.codes
    return replace(
        matrix,
        name=name,
        shape=(n, matrix.shape[1]),
        parts={
            end: cut_rows(part, part.name, first, n) if end in matrix.by_rows else part
            for end, part in matrix.parts.items()
        },
        floats=lambda parts, at, n: floats(parts, first + at, n),
        codes=None if codes is None else lambda parts, at, n: codes(parts, first + at, n),
        share=n / matrix.shape[0],
    )


def modules(
    tensors: Tensors, required: Collection[str], optional: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, SafetensorsTensor]]]:
    """Each quantised module's name, and its tensors by the ends of their names. One with a `weight` alone is plain.

    Raises CheckpointFormatError that names a missing tensor.
    """
    found: dict[str, dict[str, SafetensorsTensor]] = {}
    for name, tensor in tensors.items():
        for end in (*required, *optional):
            if name.endswith(f".{end}"):
                found.setdefault(name.removesuffix(f".{end}"), {})[end] = tensor
    for module, parts in found.items():
        if set(parts) == {"weight"}:
            continue
        if missing := [f"{module}.{end}" for end in required if end not in parts]:
            file, name = next((tensor.file, tensor.name) for tensor in parts.values())
            raise CheckpointFormatError(
                f"{file}: {short_repr(name)} needs {join_names(missing)}, which no file holds; download it again"
            )
        yield module, parts


def warn_of_unknown(settings: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Warns of settings whose names do not begin with one of the known ones."""
    stated = [key for key, value in settings.items() if value is not None]
    warn_unknown("quantization_config", (key for key in stated if not key.startswith(known)))


def warn_of_activations(method: str) -> None:
    warn(f"{method} also quantises the activations of this model; here its weights alone are quantised")


def warn_of_cache(settings: Mapping[str, Any]) -> None:
    if found := [key for key in ("kv_cache_scheme", "kv_cache_quant_algo") if settings.get(key)]:
        warn(f"{found[0]} of quantization_config ignored: kv_dtype=int8 keeps keys and values in 8 bits")


def expect(tensor: SafetensorsTensor, dtypes: Collection[str], shape: tuple[int, ...]) -> None:
    """Raises CheckpointFormatError, which names the tensor, if it has another dtype or shape."""
    if tensor.dtype not in dtypes or tensor.shape != shape:
        wanted = f"{' or '.join(dtypes)} of {shape} as the settings ask"
        raise fault(tensor, f"is {tensor.dtype} of shape {short_repr(tensor.shape)}, not {wanted}")


def sizes_of(tensor: SafetensorsTensor) -> tuple[int, int]:
    """The shape of a matrix. Raises CheckpointFormatError, which names the tensor, if it is none or is empty."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise fault(tensor, f"is of shape {short_repr(tensor.shape)}, but must be a matrix")
    return tensor.shape[0], tensor.shape[1]


def fault(tensor: SafetensorsTensor, what: str) -> CheckpointFormatError:
    """The error for a tensor that is not what its method writes."""
    return CheckpointFormatError(f"{tensor.file}: tensor {short_repr(tensor.name)} {what}; download it again")


def scales_of(parts: Tensors) -> list[SafetensorsTensor]:
    """The parts that hold floats, those that are no weights first."""
    floats = {end: part for end, part in parts.items() if part.dtype in WEIGHTS or part.dtype in _NOT_FINITE}
    return [floats[end] for end in sorted(floats, key=lambda end: (end == "weight", end))]


def read_part(tensor: SafetensorsTensor, first: int = 0, n: int | None = None) -> Tensor:
    """`n` rows of a tensor from row `first` on, or all of it, in the file's dtype (U32 as int32).

    Raises CheckpointFormatError for NaN or infinity, for other dtypes, and if the file has changed.
    """
    if tensor.dtype not in _DTYPES:
        raise fault(tensor, f"is {tensor.dtype}, which no quantised weight is made of")
    shape = tensor.shape if n is None else (n, *tensor.shape[1:])
    values = torch.empty(shape, dtype=_DTYPES[tensor.dtype], device="cpu")
    memory = values.view(-1).view(torch.uint8).numpy().data
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin + first * (values.nbytes // max(n or 1, 1)))
            is_whole = file.readinto(memory) == values.nbytes
        if not is_whole or stamp_of(tensor.file.stat()) != tensor.stamp:
            raise changed(tensor.file)
    except OSError:
        raise changed(tensor.file) from None
    if not _is_finite(values, tensor.dtype):
        raise fault(tensor, "holds NaN or infinity")
    return values


def _is_finite(values: Tensor, dtype: str) -> bool:
    if dtype in _NOT_FINITE and values.numel():  # PyTorch would widen them first
        bits = values.view(torch.uint8)
        return int((bits if dtype == "F8_E8M0" else bits & 0x7F).max()) < _NOT_FINITE[dtype]
    return dtype not in WEIGHTS or bool(torch.isfinite(values).all())


def read_matrix(
    matrix: QuantizedMatrix, decode: Callable[[Parts, int, int], Decoded], at_once: int
) -> Iterator[tuple[int, Decoded]]:
    """Every row of a matrix, decoded by its `floats` or `codes` in chunks of `at_once`, with the index of the first.

    Memory holds its packed parts and a chunk. Raises CheckpointFormatError, also for weights that are NaN or infinite.
    A scale of codes that float16 cannot hold is infinite.
    """
    whole = {end: read_part(tensor) for end, tensor in matrix.parts.items() if end not in matrix.by_rows}
    for first in range(0, matrix.shape[0], at_once):
        n = min(at_once, matrix.shape[0] - first)
        with one_thread():
            rows = decode(whole | {end: read_part(matrix.parts[end], first, n) for end in matrix.by_rows}, first, n)
            if (~torch.isfinite(rows) if isinstance(rows, Tensor) else rows.scale.isnan()).any():
                scale, *others = scales_of(matrix.parts)
                beside = f", with {join_names(part.name for part in others)}" if others else ""
                raise fault(scale, f"gives NaN or infinite weights{beside}")
        yield first, rows
        del rows  # before the next ones are decoded
