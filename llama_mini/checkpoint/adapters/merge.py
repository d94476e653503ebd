"""A checkpoint with adapters merged into it: a `Source` whose rows are changed as they are read, in float32.

The new weight is W + Σ w · (W' − W): w is the weight that the user gives an adapter, W' is the model's weight W with
that adapter alone. LoRA: W' = W + scale · B·A. DoRA scales the rows of this to the lengths that it learned. For LoRA,
the sum is that of PEFT's add_weighted_adapter(combination_type="cat").
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_mini.checkpoint.adapters.adapter import Adapter, Part, Role
from llama_mini.checkpoint.families import has_interleaved_pairs, key_table
from llama_mini.checkpoint.io.files import VOCABULARIES, exists, inside
from llama_mini.checkpoint.keys import EMBEDDING, HEAD, to_file_name, whole_name
from llama_mini.checkpoint.rows import reorder_pairs
from llama_mini.checkpoint.source import Destination, Rows, Source, StoredTensor, no_destination
from llama_mini.errors import CheckpointFormatError, CheckpointMismatchError
from llama_mini.validate import join_names

_OUTER = re.compile(r"^(model\.|language_model\.|text_model\.)*")  # what the names of a text model may lack
_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class _Change:
    """What one adapter does to one weight.

    target: the weight's name in the model of transformers.
    rows: those of the adapter's tensors that belong to the weight; None: all. (Phi-3 has q, k and v in one.)
    interleaved: whether they are of q or k, with the two elements of each rotary pair side by side.
    """

    source: Source
    adapter: Adapter
    target: str
    parts: Mapping[Role, Part]
    rows: slice | None
    interleaved: bool

    @property
    def module(self) -> str:
        """The target as adapter_config.json names it."""
        return self.target.removesuffix(".weight")

    @property
    def token_ids(self) -> Sequence[int]:
        """The rows that `tokens` holds."""
        named = self.adapter.config.token_ids.items()
        return next((ids for module, ids in named if f".{self.module}".endswith(f".{module}")), ())

    @property
    def by_columns(self) -> bool:
        """Whether `magnitude` has the lengths of columns: PEFT's DoRA of an embedding, which is stored transposed."""
        return "magnitude" in self.parts and self.parts["b"].transposed and not self.adapter.config.is_mlx

    def in_order(self, values: Tensor) -> Tensor:
        """Values for the rows of the adapter's own weight, for the rows of the model's weight."""
        values = values if self.rows is None else values[self.rows]
        return reorder_pairs(values, self.source.config, to_file=False) if self.interleaved else values

    def check_shapes(self, rows: int, shape: tuple[int, ...], may_grow: bool) -> None:
        """Compares its tensors with a weight of `shape`, of which the adapter sees `rows` rows."""
        columns = shape[1] if len(shape) == 2 else 0
        if "whole" in self.parts:
            found = self.adapter.tensors[self.parts["whole"].name].shape
            rows = found[0] if may_grow and len(found) == 2 else rows
        rank, ids = self.adapter.config.rank_of(self.module), self.token_ids
        expected: dict[Role, tuple[int, ...]] = {
            "whole": (rows, *shape[1:]),
            "a": (rank, columns),
            "b": (rows, rank),
            "magnitude": (columns if self.by_columns else rows,),
            "tokens": (len(ids), columns),
        }
        for role, part in self.parts.items():
            stored = self.adapter.tensors[part.name].shape
            if (stored[::-1] if part.transposed else stored) != expected[role]:
                wanted = expected[role][::-1] if part.transposed else expected[role]
                what = f"{part.name} is {stored}, but {self.source.path} needs {wanted}"
                raise CheckpointMismatchError(f"{self.adapter.path}: {what}; {_made_for(self.adapter)}")
        if any(token >= rows for token in ids):
            raise CheckpointMismatchError(f"{self.adapter.path} trains token {max(ids)}, but the model has {rows}")

    def load(self, dtype: torch.dtype) -> dict[Role, Tensor]:
        """Its tensors, all but a whole weight. Raises CheckpointFormatError for NaN and infinity."""
        by_name = {part.name: (role, part.transposed) for role, part in self.parts.items() if role != "whole"}
        loaded: dict[Role, Tensor] = {}
        for name, _, stored in self.adapter.read_rows(by_name, dtype, no_destination, True):
            if not torch.isfinite(stored).all():
                raise CheckpointFormatError(f"{self.adapter.path}: {name} holds NaN or infinity; download it again")
            role, transposed = by_name[name]
            values = (stored.T if transposed else stored).to(dtype)
            by_row = role == "b" or (role == "magnitude" and not self.by_columns)
            loaded[role] = self.in_order(values) if by_row else values
        return loaded


@dataclass
class _Loaded:
    """A change with its tensors in memory. lengths: of the columns of W', if it needs them."""

    change: _Change
    parts: Mapping[Role, Tensor]
    lengths: Tensor | None = None

    def adapted(self, rows: Tensor, first: int) -> Tensor:
        """W + scale · B·A for some rows of W, the first of which has index `first`."""
        if "a" not in self.parts:
            return rows
        scale = self.change.adapter.config.scale_of(self.change.module)
        return torch.addmm(rows, self.parts["b"][first : first + len(rows)], self.parts["a"], alpha=scale)

    def new(self, rows: Tensor, first: int) -> Tensor:
        """The same rows of W'."""
        new = self.adapted(rows, first)
        if (magnitude := self.parts.get("magnitude")) is None:
            return new
        if self.lengths is not None:
            return new * (magnitude / self.lengths)
        return new * (magnitude[first : first + len(rows), None] / new.norm(dim=1, keepdim=True))

    def replace_tokens(self, rows: Tensor, first: int) -> None:
        for token, row in zip(self.change.token_ids, self.parts.get("tokens", ()), strict=False):
            if first <= token < first + len(rows):
                rows[token - first] = row


def merged(source: Source, adapters: Sequence[Adapter]) -> Source:
    """The source with the adapters in it. Raises CheckpointMismatchError if one does not fit the model."""
    changes: dict[str, list[_Change]] = {}
    for adapter in adapters:
        for name, change in _changes_of(adapter, source):
            changes.setdefault(name, []).append(change)
    tensors, tied = dict(source.tensors), dict[str, str]()
    head, embedding = to_file_name(HEAD, source.keys), to_file_name(EMBEDDING, source.keys)
    if source.config.tie_word_embeddings and (head in changes or embedding in changes):
        # An adapter of PEFT changes one of the two. mlx-lm's changes both, and so do tokens that were trained alone.
        both = [c for c in changes.get(embedding, ()) if c.adapter.config.is_mlx or "tokens" in c.parts]
        changes[head] = [*changes.get(head, ()), *both]
        stored, other = (embedding, head) if embedding in tensors else (head, embedding)
        tensors[other], tied[other] = _requantised(tensors[stored]), stored
    for name, each in changes.items():
        _check_replaced(name, each)
        tensors[name] = _requantised(tensors[name])
        if whole := next((change for change in each if "whole" in change.parts), None):
            shape = tensors.pop(name).shape  # and back at the end: it is read after those of the model
            new = whole.adapter.tensors[whole.parts["whole"].name]
            tensors[name] = new if whole.rows is None else replace(new, shape=shape)
            tied.pop(name, None)
    has_new_rows = any("whole" in change.parts for change in changes.get(embedding, ()))
    vocab_size = tensors[embedding].shape[0] if has_new_rows else source.config.vocab_size
    return replace(
        source,
        config=replace(source.config, vocab_size=vocab_size),
        tensors=tensors,
        read_rows=_Merge(source, {name: each for name, each in changes.items() if each}, tied).read,
        adapters={adapter.path: adapter.describe() for adapter in adapters},
        tokenizer=next((a.path for a in adapters if any(exists(inside(a.path, name)) for name in VOCABULARIES)), None),
    )


@dataclass(frozen=True)
class _Merge:
    """source: the model alone. changes: of weights, by their names in its file. tied: a head that the file does not
    have -> the embedding, or the other way round."""

    source: Source
    changes: Mapping[str, Sequence[_Change]]
    tied: Mapping[str, str]

    def read(self, names: Collection[str], dtype: torch.dtype, to: Destination, whole: bool) -> Iterator[Rows[Tensor]]:
        """`Source.read_rows` of the merged checkpoint."""
        wide = torch.promote_types(dtype, torch.float32)
        loaded: list[_Loaded] = []

        def destination(name: str, first: int, shape: tuple[int, ...]) -> Tensor | None:
            return None if name in self.changes else to(name, first, shape)

        for name, first, rows in self._originals(names, wide, destination, whole):
            if name in self.changes:
                if first == 0:
                    loaded = [self._load(name, change, wide) for change in self.changes[name]]
                rows = rows.to(wide, copy=True)
                for each in loaded:
                    each.replace_tokens(rows, first)
                rows += sum((each.new(rows, first) - rows) * each.change.adapter.weight for each in loaded)
            yield name, first, rows
            del rows  # before the next ones are read

    def _originals(
        self, names: Collection[str], dtype: torch.dtype, to: Destination, whole: bool
    ) -> Iterator[Rows[Tensor]]:
        """The rows of W: the model's, or those of an adapter that replaces them."""
        replaced = {n: c for n in names for c in self.changes.get(n, ()) if "whole" in c.parts}
        own = [name for name in names if name not in replaced and name not in self.tied]
        yield from self.source.read_rows(own, dtype, to, whole)
        for name in names:
            place: Destination = lambda _, *at, name=name: to(name, *at)  # noqa: E731
            if name in self.tied:
                for _, first, rows in self.source.read_rows([self.tied[name]], dtype, place, whole):
                    yield name, first, rows
                    del rows
            elif (change := replaced.get(name)) is not None:
                there, in_place = [change.parts["whole"].name], change.rows is None and not change.interleaved
                for _, first, rows in change.adapter.read_rows(there, dtype, place, whole or not in_place):
                    yield name, first, rows if in_place else change.in_order(rows)
                    del rows

    def _load(self, name: str, change: _Change, dtype: torch.dtype) -> _Loaded:
        loaded = _Loaded(change, change.load(dtype))
        if change.by_columns:
            squares = torch.zeros(loaded.parts["a"].shape[1], dtype=torch.float64)
            for _, first, rows in self._originals([name], dtype, no_destination, False):
                squares += loaded.adapted(rows.to(dtype), first).double().square().sum(0)
            loaded.lengths = squares.sqrt().to(dtype)
        return loaded


def _changes_of(adapter: Adapter, source: Source) -> Iterator[tuple[str, _Change]]:
    """The adapter's changes, each with the name of its weight in the model's file."""
    table: dict[str, list[str]] = {}
    for theirs, ours in key_table(source.model_type).items():
        table.setdefault(_OUTER.sub("", whole_name(theirs)), []).append(ours)
    config, tensors, unknown = source.config, source.tensors, list[str]()
    has_pairs = has_interleaved_pairs(source.model_type)
    head, embedding = to_file_name(HEAD, source.keys), to_file_name(EMBEDDING, source.keys)
    tied = {head: embedding, embedding: head} if config.tie_word_embeddings else {}
    for target, parts in adapter.changes.items():
        plain = _OUTER.sub("", target)
        number = layer[1] if (layer := _LAYER.match(plain)) else ""
        all_ours = table.get(_LAYER.sub("layers.{}.", plain), [] if table else [plain])
        names = {to_file_name(ours.replace("{}", number), source.keys): ours for ours in all_ours}
        stored = {name: tensors.get(name) or tensors.get(tied.get(name, "")) for name in names}
        shapes = {name: tensor.shape or (1,) for name, tensor in stored.items() if tensor is not None}
        if len(shapes) != len(names) or not names:
            unknown += [part.name for part in parts.values()]
            continue
        first, total = 0, sum(shape[0] for shape in shapes.values())
        for name, shape in shapes.items():
            rows = slice(first, first + shape[0]) if len(names) > 1 else None
            first += shape[0]
            interleaved = has_pairs and names[name].split(".")[-2] in ("q_proj", "k_proj")
            change = _Change(source, adapter, target, parts, rows, interleaved)
            change.check_shapes(total, shape, may_grow=name in (head, embedding))
            yield name, change
    if unknown:
        what = f"weights that {source.path} does not have: {join_names(unknown)}"
        raise CheckpointMismatchError(f"{adapter.path} changes {what}; {_made_for(adapter)}")


def _requantised(stored: StoredTensor) -> StoredTensor:
    """A changed tensor. Rounded to four bits again, most of a small change would be lost: int8 holds it."""
    return replace(stored, has_codes=False, order=None, kept=stored.kept and "int8")


def _check_replaced(name: str, changes: Sequence[_Change]) -> None:
    """Refuses whole weights and tokens that another adapter changes too, or of which only a share should be taken."""
    replacing = [c.adapter for c in changes if not c.parts.keys().isdisjoint(("whole", "tokens"))]
    if replacing and len(changes) > 1:
        paths = " and ".join(str(change.adapter.path) for change in changes)
        raise CheckpointMismatchError(f"{paths} change {name}, and one replaces it: leave one of them out")
    if replacing and replacing[0].weight != 1:
        wrong = f"so its weight must be 1, not {replacing[0].weight:g}"
        raise CheckpointMismatchError(f"{replacing[0].path} replaces {name}, {wrong}")


def _made_for(adapter: Adapter) -> str:
    base = adapter.config.base
    return f"the adapter was made for {base:.200}: give that model" if base else "give the model that it was made for"
