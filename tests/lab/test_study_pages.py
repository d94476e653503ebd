"""The study's pages: equal in both languages, and their commands exist."""

import re
import shlex
from pathlib import Path

from llama_mini.lab.__main__ import parser

LAB = Path(__file__).parents[2] / "llama_mini" / "lab"  # of the checkout: a wheel has no pages
ENGLISH, KOREAN = ((LAB / name).read_text(encoding="utf-8") for name in ("STUDY.md", "STUDY.ko.md"))
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


def test_the_commands_of_the_tables_exist() -> None:
    """Those in blocks and captions begin with python; in tables the name of the command comes first."""
    given = [cell[1:-1] for row in rows(ENGLISH) for cell in row if re.fullmatch(r"`[a-z]+( [^`]*)?`", cell)]
    assert len(given) > 12
    for line in given:
        parser().parse_args(shlex.split(line))
