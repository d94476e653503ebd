"""The tables, the ratios and the line of JSON."""

import json
from pathlib import Path

from benchmark.report import Ratio, as_json, conditions, ratio_table, ratios, table
from benchmark.rounds import Watch

OURS, PEER = "decode bfloat16 llama_mini", "decode bfloat16 llama.cpp"
PAIRS = [(OURS, PEER)]


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    series = {OURS: [10.0, 30.0, 26.0], PEER: [10.0, 10.0, 20.0]}  # ratios 1, 3, 1.3; of medians 2.6
    assert ratios(series, PAIRS) == [Ratio(OURS, PEER, median=1.3, least=1.0, most=3.0)]


def test_the_table_has_median_and_spread() -> None:
    line = table({OURS: [3.0, 1.0, 8.0]}).splitlines()[1]
    assert line.split() == [*OURS.split(), "3", "1", "8", "tok/s"]


def test_the_table_of_ratios_has_both_names_median_and_spread_and_no_judgement() -> None:
    line = ratio_table([Ratio(OURS, PEER, 1.3, 1.0, 3.0)]).splitlines()[1]
    assert line.split() == [*OURS.split(), "/", *PEER.split(), "1.3", "1", "3"]


def test_the_line_of_json_has_every_value_and_the_conditions() -> None:
    watch = Watch()
    watch.rounds, watch.repeated, watch.disturbed_rounds = 5, 2, 1
    series = {OURS: [1.5, 2.5], PEER: [1.0, 1.0]}
    line = as_json(conditions(2, 5, watch, Path(__file__).parent), series, ratios(series, PAIRS))
    assert "\n" not in line
    read = json.loads(line)
    assert read["series"][OURS] == {"unit": "tok/s", "values": [1.5, 2.5]}
    assert read["ratios"] == [{"over": OURS, "under": PEER, "median": 2.0, "least": 1.5, "most": 2.5}]
    assert (read["threads"], read["rounds_repeated"], read["rounds_disturbed"]) == (2, 2, 1)
    assert read["versions"]["torch"]
