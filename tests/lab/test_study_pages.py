"""The study's pages: equal in both languages, and their tables of trained models are those of the data."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from llama_mini.lab.__main__ import parser
from llama_mini.lab.reporting.healing_study import healing_study_picture
from llama_mini.lab.reporting.style import save

LAB = Path(__file__).parents[2] / "llama_mini" / "lab"  # of the checkout: a wheel has no pages
ENGLISH, KOREAN = ((LAB / name).read_text(encoding="utf-8") for name in ("STUDY.md", "STUDY.ko.md"))
STUDY = json.loads((LAB / "healing_study.json").read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[+−]?\d+(?:[.,]\d+)*(?:e[+−-]?\d+)?")
DECIMAL = re.compile(r"[+−]?\d*\.\d+")


def sections(page: str) -> list[str]:
    return re.split(r"^## ", page, flags=re.MULTILINE)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables of a page, without the lines under their heads."""
    lines = [line for line in BLOCK.sub("", text).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_both_languages_have_the_same_commands_pictures_and_sources() -> None:
    assert len(sections(ENGLISH)) == len(sections(KOREAN)) > 8
    for one, other in zip(sections(ENGLISH), sections(KOREAN), strict=True):
        assert BLOCK.findall(one.replace("python examples", "python")) == BLOCK.findall(other)  # run once, in English
        for pattern in (r"^!\[[^]]*\]\((.*?)\)", r"`[^`\n]+`", r"\d{4}\.\d{5}"):
            assert sorted(re.findall(pattern, one, re.MULTILINE)) == sorted(re.findall(pattern, other, re.MULTILINE))


def test_both_languages_have_the_same_numbers() -> None:
    """Cell by cell in tables; in the text of each section all that have a decimal point."""
    for one, other in zip(sections(ENGLISH), sections(KOREAN), strict=True):
        assert [[sorted(NUMBER.findall(cell)) for cell in row] for row in rows(one)] == [
            [sorted(NUMBER.findall(cell)) for cell in row] for row in rows(other)
        ]
        assert sorted(DECIMAL.findall(one)) == sorted(DECIMAL.findall(other))


def healing_row(run: dict[str, Any]) -> list[str]:
    """What the tables say of a run, after its name and seed: costs, KLs, the control's KL, and equal top tokens."""
    if "error" in run:
        return ["diverges"]
    first, last = (dict(zip(STUDY["columns"], run["curve"][at], strict=True)) for at in (0, -1))
    control = "" if run["control"] is None else number(run["control"][-1][STUDY["columns"].index("kl")])
    costs = [signed(point["dloss"], point["se"]) for point in (first, last)]
    return [*costs, *(number(point["kl"]) for point in (first, last)), control, f"{100 * last['top1']:.0f} %"]


def healing_points(run: dict[str, Any]) -> list[list[str]]:
    """The table of one long run: a line for each point of its curve."""
    points = [dict(zip(STUDY["columns"], point, strict=True)) for point in run["curve"]]
    return [
        [f"{p['tokens']:,}", signed(p["dloss"], p["se"]), number(p["kl"]), f"{100 * p['top1']:.0f} %"] for p in points
    ]


def signed(cost: float | None, se: float) -> str:
    if cost is None:
        return "NaN"
    digits = 2 if se >= 0.095 else 3 if se >= 0.0095 else 4
    return f"{cost:+.{digits}f} ± {se:.{digits}f}".replace("-", "−")


def number(kl: float | None) -> str:
    return "NaN" if kl is None else f"{kl:.2f}" if kl >= 0.995 else f"{kl:#.2g}"


def test_the_tables_of_trained_models_are_those_of_the_data() -> None:
    shown = [row[1:] for row in rows(ENGLISH) if re.search(r", seed \d+$", row[0])]
    assert shown == [healing_row(run) for run in STUDY["runs"]]
    names = [row[0] for row in rows(ENGLISH) if re.search(r", seed \d+$", row[0])]
    assert names == [f"{run['change']}, seed {run['seed']}" for run in STUDY["runs"]]
    assert [row for row in rows(ENGLISH) if len(row) == 4 and re.fullmatch(r"[\d,]+", row[0])] == [
        row for run in STUDY["long"] for row in healing_points(run)
    ]


def test_the_data_are_small_and_draw_the_picture(tmp_path: Path) -> None:
    assert (LAB / "healing_study.json").stat().st_size < 60_000
    save(healing_study_picture(STUDY), tmp_path / "a.svg")
    drawn, kept = (path.read_text(encoding="utf-8") for path in (tmp_path / "a.svg", LAB / "healing_study.svg"))
    for part in (r"<text[^>]*>([^<]*)<", r"<use "):  # the words and the number of marks: bits differ between machines
        assert re.findall(part, drawn) == re.findall(part, kept)


def test_the_commands_of_the_tables_exist() -> None:
    """Those in blocks and captions begin with python; in tables the name of the command comes first."""
    given = [cell[1:-1] for row in rows(ENGLISH) for cell in row if re.fullmatch(r"`[a-z]+( [^`]*)?`", cell)]
    assert len(given) > 15
    for line in given:
        parser().parse_args(shlex.split(line))
