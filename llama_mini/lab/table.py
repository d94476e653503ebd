"""Rows of one dataclass, which print as a table and are written as JSON or CSV."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

Row = TypeVar("Row")


class Table(Sequence[Row], Generic[Row]):
    """An immutable list of dataclass rows. `str()` is the table; floats in it have four significant digits."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def column(self, name: str) -> list[Any]:
        return [getattr(row, name) for row in self._rows]

    def to_json(self) -> str:
        """A JSON list of objects; what is not finite is null."""
        rows = [{name: _finite(getattr(row, name)) for name in self._names()} for row in self._rows]
        return json.dumps(rows, indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """A header and one line a row; None is empty. An empty table is empty text: it knows no names."""
        names = self._names()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        lines = [names, *([getattr(row, name) for name in names] for row in self._rows)]
        writer.writerows(lines if names else [])
        return text.getvalue()

    def __str__(self) -> str:
        names = self._names()
        cells = [names, *([_shown(getattr(row, name)) for name in names] for row in self._rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        numeric = [all(isinstance(getattr(row, name), int | float | None) for row in self._rows) for name in names]
        lines = []
        for row in cells:
            parts = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            ]
            lines.append("  ".join(parts).rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _names(self) -> list[str]:
        return [f.name for f in fields(self._rows[0])] if self._rows else []  # type: ignore[arg-type]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
