"""Rows as a table, as JSON and as CSV, read back by Python's own readers."""

import csv
import io
import json
import math
from dataclasses import dataclass

import pytest

from llama_mini.lab.table import Table


@dataclass(frozen=True)
class Row:
    path: str
    dloss: float
    eps: float | None
    layer: int


ROWS = [Row("layers.0, the first", 0.123456789, 1e-05, 0), Row("norm", math.nan, None, 11), Row("x", -math.inf, 2.5, 2)]


def test_it_is_a_sequence() -> None:
    table = Table(ROWS)
    assert len(table) == 3
    assert list(table) == ROWS
    assert table[1] is ROWS[1]
    assert table.column("layer") == [0, 11, 2]


def test_print() -> None:
    assert str(Table(ROWS)).splitlines() == [
        "path                  dloss    eps  layer",
        "layers.0, the first  0.1235  1e-05      0",
        "norm                    nan      –     11",
        "x                      -inf    2.5      2",
    ]
    assert repr(Table(ROWS)) == str(Table(ROWS))


def test_a_column_without_values_is_kept_for_programs_and_not_printed() -> None:
    table = Table([Row("norm", 1.0, None, 3), Row("x", 2.0, None, 4)])
    assert str(table).splitlines()[0].split() == ["path", "dloss", "layer"]
    assert table.shown() == ["path", "dloss", "layer"]
    assert table.to_csv().splitlines()[0] == "path,dloss,eps,layer"
    assert json.loads(table.to_json())[0]["eps"] is None


def test_json_is_strict_and_exact() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(Table(ROWS).to_json(), parse_constant=refuse) == [
        {"path": "layers.0, the first", "dloss": 0.123456789, "eps": 1e-05, "layer": 0},
        {"path": "norm", "dloss": None, "eps": None, "layer": 11},
        {"path": "x", "dloss": None, "eps": 2.5, "layer": 2},
    ]


def test_json_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Table([Row("a", [math.nan], None, 0)]).to_json()  # type: ignore[arg-type]


def test_csv() -> None:
    assert list(csv.reader(io.StringIO(Table(ROWS).to_csv()))) == [
        ["path", "dloss", "eps", "layer"],
        ["layers.0, the first", "0.123456789", "1e-05", "0"],
        ["norm", "nan", "", "11"],
        ["x", "-inf", "2.5", "2"],
    ]


def test_an_empty_table() -> None:
    table: Table[Row] = Table([])
    assert (str(table), table.to_csv(), json.loads(table.to_json())) == ("", "", [])
