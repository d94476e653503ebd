"""An opened checkpoint, whatever its format: what its headers say, and how its tensors are read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from llama_mini.checkpoint.code_formats import SUPER_BLOCK
from llama_mini.checkpoint.gguf.header import GGUFHeader
from llama_mini.checkpoint.keys import KeyTable
from llama_mini.model.config import LlamaConfig

Values = TypeVar("Values", Tensor, "StoredCodes")
Rows = tuple[str, int, Values]  # the tensor's name in the file, the index of the first row, the rows
# Name in the file, first row, shape -> the memory for these rows; None lets the reader allocate it.
Destination = Callable[[str, int, tuple[int, ...]], Tensor | None]
# (names, dtype, destination, whole) -> every row once, in order within a tensor. Rows are in `dtype` or in the file's
# dtype, and may already lie in `destination`. A matrix comes in chunks of `rows_per_chunk` rows, with `whole` in one.
ReadRows = Callable[[Collection[str], torch.dtype, Destination, bool], Iterator[Rows[Tensor]]]
_CHUNK = 1 << 20  # elements of a matrix that are read at once: a whole embedding would be a second model
BLOCK_ROWS = 16  # rows that the packed formats of optimize/ store together


class QuantizedWeights(NamedTuple):
    """Rows of a matrix in one of code_formats.FORMATS, which says what a code stands for.

    `codes` (rows, columns) uint8; `scale`, and `min` if the format has one, (rows, groups of columns) float16; or int8
    with `super_scales` (rows, n) float16: a factor for the scales of 256 columns, and after it one for their minimums.
    """

    codes: Tensor
    scale: Tensor
    min: Tensor | None
    super_scales: Tensor | None = None

    def unpacked(self) -> "QuantizedWeights":
        return self

    def multiplied(self) -> "QuantizedWeights":
        """Without `super_scales`: the products, rounded to float16. One that this cannot hold is infinite."""
        if self.super_scales is None:
            return self
        numbers = [values for values in (self.scale, self.min) if values is not None]
        super_scales, n = self.super_scales.unflatten(1, (-1, len(numbers))).unbind(-1), self.scale.shape[1]
        each = SUPER_BLOCK * n // self.codes.shape[1]
        products = [
            (factor.float().repeat_interleave(each, 1)[:, :n] * values).half()
            for factor, values in zip(super_scales, numbers, strict=True)
        ]
        return QuantizedWeights(self.codes, products[0], None if self.min is None else products[1])


class StoredCodes(Protocol):
    """Rows of a matrix as a file stores them, which need no requantising."""

    def unpacked(self) -> QuantizedWeights: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape` as the model has it, `number_format` as the file names it (BF16, Q4_1).

    kept: the narrowest of code_formats.FORMATS that loses none of its bits, if it is quantised; None for floats.
    has_codes: whether `Source.read_quantized` reads it as codes of that format. If not, it is requantised.
    order: the weight's columns in the order of those codes, (columns,) int64, if that is another.
    """

    file: Path
    shape: tuple[int, ...]
    number_format: str
    n_bytes: int
    kept: str | None = None
    has_codes: bool = False
    order: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint, in one form for every format.

    path: the directory or file.
    format: a description for people, such as "Hugging Face directory, 2 safetensors files".
    model_type: the family's name in Hugging Face's config.json.
    dtype: the model's dtype unless the caller names one.
    keys: tensor names in the file -> ours.
    tensors: by name in the file, in the order of their data.
    read_rows: reads tensors as floats, with rotary pairs in the model's order.
    read_quantized: reads tensors with `has_codes` as they are stored.
    gguf: the header of a GGUF file, which also holds the tokenizer.
    adapters: the directories of the adapters that are merged into it, each with a description for people.
    tokenizer: the directory of an adapter whose tokenizer comes before that of the checkpoint.
    """

    path: Path
    format: str
    model_type: str
    config: LlamaConfig
    dtype: torch.dtype
    keys: KeyTable
    tensors: Mapping[str, StoredTensor]
    read_rows: ReadRows
    read_quantized: Callable[[Collection[str]], Iterator[Rows[StoredCodes]]] = lambda _: iter(())
    gguf: GGUFHeader | None = None
    adapters: Mapping[Path, str] = field(default_factory=dict)
    tokenizer: Path | None = None

    @property
    def directory(self) -> Path:
        """The directory that holds the checkpoint's files."""
        return self.path if self.path.is_dir() else self.path.parent

    def read(
        self, names: Collection[str], dtype: torch.dtype, destination: Destination | None = None, whole: bool = False
    ) -> Iterator[Rows[Tensor]]:
        """Rows in `dtype`, written to `destination` where it returns memory. Raises CheckpointError."""
        destination = destination or no_destination
        for name, first, rows in self.read_rows(names, dtype, destination, whole):
            target = destination(name, first, tuple(rows.shape))
            if target is None:
                target = rows.to(dtype)
            elif target.data_ptr() != rows.data_ptr():
                target.copy_(rows)
            del rows  # before the next ones are read: both would be in memory
            yield name, first, target
            del target


def no_destination(name: str, first: int, shape: tuple[int, ...]) -> None:
    """The `Destination` that always lets the reader allocate."""


def rows_per_chunk(columns: int, elements: int | None = None) -> int:
    """How many rows of a matrix are read at once: a multiple of 16, so that packed formats can store each chunk."""
    return max(BLOCK_ROWS, (elements or _CHUNK) // max(columns, 1) // BLOCK_ROWS * BLOCK_ROWS)
