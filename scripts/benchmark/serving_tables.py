"""What servers did under load, in Markdown tables with a column for each number of users."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmark.engines import OURS
from benchmark.report import digits, rounds_ratio

GUESSING = "llama_mini, guessing tokens"
CHAT = "llama_mini, chats"
ENGINE = "llama_mini without a server"
FIGURES = "new tokens per second; ms to the first text, median / 95th percentile; ms between texts of one answer, same"
RATIOS = {
    "speed": "new tokens per second",
    "first50": "median to the first text",
    "gap95": "95th percentile between texts",
}
OVER_OURS = (GUESSING, CHAT)  # figures that are divided by those of this project's server; it is divided by the others'
Figures = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One server under the load of so many users: the figures of every round."""

    format: str
    users: int
    server: str
    rounds: Sequence[Figures]


def figures_text(rounds: Sequence[Figures]) -> str:
    """Medians of rounds, in the order and the units of FIGURES."""
    middle = {name: digits(statistics.median(each[name] for each in rounds)) for name in rounds[0]}
    if "longest_gap" in middle:
        return f"longest gap {middle['longest_gap']} ms, first text of the prompt after {middle['first']} ms"
    latencies = [f"{middle[f'{name}50']} / {middle[f'{name}95']}" for name in ("first", "gap") if f"{name}50" in middle]
    return "; ".join([middle["speed"], *latencies])


def serving_tables(cells: Sequence[Cell]) -> str:
    """The figures of all servers, the ratios round by round with their least and most, and what a long prompt does."""
    loads = [cell for cell in cells if "speed" in cell.rounds[0]]
    columns = sorted({cell.users for cell in loads})
    found: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for cell in loads:
        found[f"{cell.format}, {cell.server}"][cell.users] = figures_text(cell.rounds)

    ours = {(cell.format, cell.users): cell for cell in loads if cell.server == OURS}
    pairs = [(ours[cell.format, cell.users], cell) for cell in loads if cell.server != OURS]
    ratios: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for figure, what in RATIOS.items():
        for our, other in pairs:
            over, under = (other, our) if other.server in OVER_OURS else (our, other)
            if figure == "speed" or (over is our and figure in other.rounds[0]):
                three = rounds_ratio(*([each[figure] for each in cell.rounds] for cell in (over, under)))
                middle, least, most = map(digits, three)
                row = f"{what}, {our.format}, {over.server} / {under.server}"
                ratios[row][our.users] = f"{middle} ({least}-{most})"

    beside = [f"{cell.format}, {cell.server}: {figures_text(cell.rounds)}\n" for cell in cells if cell not in loads]
    return "\n".join([_table(FIGURES, columns, found), _table("ratio", columns, ratios), "".join(beside)])


def _table(what: str, columns: Sequence[int], rows: Mapping[str, Mapping[int, str]]) -> str:
    lines = [[what, *(f"C={users}" for users in columns)], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(users, "") for users in columns)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
