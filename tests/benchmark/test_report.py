"""The table, the ratios against what must be reached, and the line of JSON."""

import json
from pathlib import Path

import pytest

from benchmark.report import UNITS, as_json, conditions, judged, table, targets, verdicts
from benchmark.rounds import Watch

OURS, PEER = "decode bfloat16 llama_mini", "decode bfloat16 llama.cpp"


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    series = {OURS: [10.0, 30.0, 26.0], PEER: [10.0, 10.0, 20.0]}  # ratios 1, 3, 1.3; of medians 2.6
    (found,) = verdicts(series)
    assert (found.median, found.least, found.most) == (1.3, 1.0, 3.0)
    assert found.met
    assert found.short == 0


def test_what_is_missed_is_said_with_its_share() -> None:
    (found,) = verdicts({OURS: [1.04], PEER: [1.0]})  # 1.3 is wanted
    assert not found.met
    assert found.short == pytest.approx(0.2)
    assert "at least 1.3: missed by 20 %" in judged([found])


@pytest.mark.parametrize(("value", "met", "short"), [(0.001, True, 0), (0.002, True, 0), (0.003, False, 0.5)])
def test_some_must_stay_below_their_bound(value: float, met: bool, short: float) -> None:
    (found,) = verdicts({"quality int8 over bfloat16, mean": [value]})
    assert found.met == met
    assert found.short == pytest.approx(short)
    assert "at most 0.002" in judged([found])


def test_a_target_without_its_series_is_left_out() -> None:
    assert verdicts({OURS: [2.0]}) == []


def test_every_target_has_a_unit_and_judges_another_series() -> None:
    wanted = list(targets())
    assert {target.over.split()[0] for target in wanted} <= UNITS.keys()
    assert len({(target.over, target.under) for target in wanted}) == len(wanted)


def test_the_table_has_median_and_spread() -> None:
    line = table({OURS: [3.0, 1.0, 8.0]}).splitlines()[1]
    assert line.split() == [*OURS.split(), "3", "1", "8", "tok/s"]


def test_the_line_of_json_has_every_value_and_the_conditions() -> None:
    watch = Watch()
    watch.runs, watch.again, watch.kept = 5, 2, 1
    series = {OURS: [1.5, 2.5], PEER: [1.0, 1.0]}
    line = as_json(conditions(2, 5, watch, Path(__file__).parent), series, verdicts(series))
    assert "\n" not in line
    read = json.loads(line)
    assert read["series"][OURS] == {"unit": "tok/s", "values": [1.5, 2.5]}
    assert read["targets"][0]["median"] == 2.0
    assert (read["threads"], read["rounds_taken_again"], read["rounds_disturbed"]) == (2, 2, 1)
    assert read["versions"]["torch"]
