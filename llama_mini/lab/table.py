"""A table: rows with the same attributes, which can be printed, or written as JSON or CSV."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

Row = TypeVar("Row")


class Table(Sequence[Row], Generic[Row]):
    """An immutable list of rows. `str()` lays them out in columns; floats have four significant digits.

    note: a line for people that says what the rows are, below them.
    """

    def __init__(self, rows: Sequence[Row], note: str = "") -> None:
        self._rows, self.note = tuple(rows), note

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def column(self, name: str) -> list[Any]:
        return [getattr(row, name) for row in self._rows]

    def shown(self) -> list[str]:
        """The names of the columns that are shown to people: those with a value in some row."""
        return [name for name in self._names() if any(value is not None for value in self.column(name))]

    def to_json(self) -> str:
        """A JSON list of objects. A number that is not finite is null."""
        rows = [{name: finite(getattr(row, name)) for name in self._names()} for row in self._rows]
        return json.dumps(rows, indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """A header, then a line for each row; None is empty. Without rows there are no column names, and so no text."""
        names = self._names()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        lines = [names, *([getattr(row, name) for name in names] for row in self._rows)]
        writer.writerows(lines if names else [])
        return text.getvalue()

    def __str__(self) -> str:
        columns = []
        for name in self.shown():
            values = self.column(name)
            cells = [name, *map(_cell, values)]
            width, numeric = max(map(len, cells)), all(isinstance(value, int | float | None) for value in values)
            columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
        lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
        return "\n".join([*lines, self.note] if self.note else lines)

    __repr__ = __str__

    def _names(self) -> list[str]:
        return [*vars(self._rows[0])] if self._rows else []


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
