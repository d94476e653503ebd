"""What several files of tests watch."""

from typing import Any

import pytest

from llama_mini.engine import runner
from llama_mini.engine.pages import PagedTokens


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens of each) of the forward passes: a step has one token a row, a part of a prompt more, in one row."""
    seen = list[tuple[int, int]]()

    def tokens(pages: Any, rows: Any, positions: Any) -> PagedTokens:
        seen.append((len(positions), len(positions[0])))
        return PagedTokens(pages, rows, positions)

    monkeypatch.setattr(runner, "PagedTokens", tokens)
    return seen
