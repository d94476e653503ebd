"""The header of a safetensors file, by a reader that believes no number it has not checked.

Format: https://huggingface.co/docs/safetensors. The library refuses what is refused here too, but with one short
message for many faults and after allocating, and to give some rows of a tensor it reads all of it.
"""

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from llama_mini.checkpoint.io.file_kind import (
    HEAD,
    MAX_SAFETENSORS_HEADER,
    FileKind,
    describe,
    kind_of,
    open_file,
    size_of,
)
from llama_mini.checkpoint.io.files import decode_json
from llama_mini.errors import CheckpointFormatError
from llama_mini.validate import is_whole, short_repr

WEIGHTS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in WEIGHTS.items()}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
_BITS |= dict.fromkeys(("I32", "U32", "F32"), 32)
_BITS |= dict.fromkeys(("C64", "F64", "I64", "U64"), 64)
_LARGEST = 2**63 - 1
METADATA = "__metadata__"


class TensorInfo(NamedTuple):
    """One tensor of a file: `dtype` as the file has it ("BF16"), `begin` and `end` in bytes from the data's start."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor by name, in the order of the data, which is checked against the file's size but not read.

    Raises:
        CheckpointPathError: there is no such file, or it cannot be read.
        CheckpointFormatError: the file is no safetensors file or is broken; names the file and the fault.
    """
    with open_file(path) as file:
        text = _header_text(path, file)
        n_bytes = size_of(file) - file.tell()
    header = _parse(path, text)
    _check_metadata(path, header.pop(METADATA, None))
    if not header:
        raise _fault(path, "it holds no tensors; download it again")
    infos = sorted((_tensor_info(path, *item) for item in header.items()), key=position)
    _check_layout(path, infos, n_bytes)
    return {info.name: info for info in infos}


def position(info: TensorInfo) -> tuple[int, int]:
    return info.begin, info.end


def weight_dtype(info: TensorInfo) -> torch.dtype:
    """What the tensor is read as. Raises CheckpointFormatError for numbers that are no weights, by name."""
    if info.dtype in WEIGHTS:
        return WEIGHTS[info.dtype]
    if info.dtype.startswith("F"):
        what = f"is quantised to {_BITS[info.dtype]} bits"
    else:
        what = {"BOOL": "holds truth values", "C64": "holds complex numbers"}.get(info.dtype, "holds integers")
    raise _fault(
        info.file,
        f"tensor {short_repr(info.name)} {what} ({info.dtype}), but weights are read from {', '.join(WEIGHTS)}; give a "
        "checkpoint that has them so",
    )


def _header_text(path: Path, file: BinaryIO) -> str:
    """The header of a file that stands at its start, and then at that of its data."""
    size = size_of(file)
    kind = kind_of(file.read(HEAD), size)
    if kind not in (FileKind.SAFETENSORS, FileKind.OTHER):
        raise CheckpointFormatError(f"{path} is not a safetensors file but {describe(kind)}")
    if size < 8:
        raise _fault(path, f"it has {size} bytes, and 8 are needed for the length of the header; download it again")
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_SAFETENSORS_HEADER:
        raise _fault(
            path, f"its header would have {length} bytes, where {MAX_SAFETENSORS_HEADER} are allowed; download it again"
        )
    if length > size - 8:
        raise _fault(path, f"its header has {length} bytes, but only {size - 8} are there; download it again")
    data = file.read(length)
    if len(data) != length:
        raise changed(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _fault(path, f"its header is not UTF-8 at byte {error.start}; download it again") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        header = decode_json(text, unique_names=True)
    except ValueError as error:
        raise _fault(path, f"its header {error}; download it again") from None
    if not isinstance(header, dict):
        raise _fault(path, f"its header is a JSON {type(header).__name__}, not an object; download it again")
    return header


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _fault(path, f"{METADATA} must map strings to strings, but is {short_repr(metadata)}; download it again")


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    what = f"tensor {short_repr(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _fault(
            path, f"{what} must have dtype, shape and data_offsets, but is {short_repr(entry)}; download it again"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _fault(path, f"{what} has the unknown dtype {short_repr(dtype)}; known are {', '.join(_BITS)}")
    if not _are_sizes(shape):
        raise _fault(path, f"{what} has the shape {short_repr(shape)}, not whole numbers from 0 to 2**63 - 1")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _fault(
            path, f"{what} has the data_offsets {short_repr(offsets)}, not two whole numbers from 0 to 2**63 - 1"
        )
    begin, end = offsets
    if end < begin:
        raise _fault(path, f"{what} has reversed data_offsets: it begins at {begin} and ends at {end}")
    n_bits = _n_elements(path, what, shape) * _BITS[dtype]
    if n_bits != (end - begin) * 8:
        raise _fault(
            path,
            f"{what}, {dtype} of shape {short_repr(shape)}, takes {n_bits / 8:.16g} bytes, but its data_offsets "
            f"{short_repr(offsets)} hold {end - begin}; download it again",
        )
    return TensorInfo(name, path, tuple(shape), dtype, begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(is_whole(item) and 0 <= item <= _LARGEST for item in value)


def _n_elements(path: Path, what: str, shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= max(size, 1)  # PyTorch multiplies them all, even if one is 0
        if n > _LARGEST:
            raise _fault(path, f"{what} has the shape {short_repr(shape)}, of more than 2**63 - 1 elements")
    return 0 if 0 in shape else n


def _check_layout(path: Path, infos: list[TensorInfo], n_bytes: int) -> None:
    """The tensors, in order, cover `n_bytes` without a hole and not twice."""
    end, before = 0, ""
    for info in infos:
        if info.begin < end:
            raise _fault(path, f"tensors {short_repr(before)} and {short_repr(info.name)} overlap; download it again")
        if info.begin > end:
            raise _fault(
                path,
                f"{info.begin - end} bytes before tensor {short_repr(info.name)} belong to none; download it again",
            )
        end, before = info.end, info.name
    if end > n_bytes:
        raise _fault(path, f"it is cut short: {end - n_bytes} of {end} bytes of data are missing; download it again")
    if end < n_bytes:
        raise _fault(
            path, f"{n_bytes - end} bytes follow the last tensor, where the file should end; download it again"
        )


def changed(path: Path) -> CheckpointFormatError:
    return _fault(path, "it changed while it was read; load it again")


def _fault(path: Path, sentence: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path}: {sentence}")
