"""A whole run of the bench: the measures asked for, one after another, and what is printed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmark import MEASURES
from benchmark.engines import Checkpoint
from benchmark.measures import QUICK, Bench, Sizes, against_peers, batch, busy, context, loading, quality, say, start
from benchmark.report import as_json, conditions, ratio_table, ratios, table
from benchmark.rounds import Child, Watch
from benchmark.servers import command_of
from benchmark.serving_tables import serving_tables
from benchmark.shapes import files, long, verify
from llama_mini.errors import RequestError
from llama_mini.machine import usable_cores
from llama_mini.tokenizer import Tokenizer

TEXTS = Path(__file__).parent / "texts"  # fixed copies: a text that changes would move every figure taken on it


def run(
    measures: Sequence[str],
    quick: bool,
    json_file: Path | None,
    root: Path,
    servers: Mapping[str, str] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> None:
    """Measures and prints; if it is stopped or an engine fails, what was measured until then. Raises LlamaMiniError.

    root: the checkout, whose commit is stated. servers: beside which this project's server is measured, by name; None
    measures no server. sizes: that replace the usual ones.
    """
    if unknown := [name for name in measures if name not in MEASURES]:
        raise RequestError(f"unknown measure {unknown[0]!r:.80} in --only; known: {', '.join(MEASURES)}")
    bench = _bench(quick, sizes or {})
    try:
        _measure(bench, measures, servers)
    finally:
        if bench.series or bench.cells:
            _report(bench, json_file, root)


def _measure(bench: Bench, measures: Sequence[str], servers: Mapping[str, str] | None) -> None:
    if peers := [name for name in ("decode", "prefill") if name in measures]:
        against_peers(bench, peers)
    for measure in (batch, verify, context, long, files, busy, start, quality):
        if measure.__name__ in measures:
            measure(bench)
    if loads := [name for name in ("load", "memory") if name in measures]:
        loading(bench, loads)
    if servers is not None:
        from benchmark.serving import serving  # which needs what the other measures do not

        serving(bench, {name: command_of(text) for name, text in servers.items()})


def _report(bench: Bench, json_file: Path | None, root: Path) -> None:
    found = ratios(bench.series, bench.pairs)
    about = {**conditions(bench.threads, bench.sizes.repeats, bench.watch, root), "builds": bench.builds}
    line = as_json({**about, "serving": [asdict(cell) for cell in bench.cells]}, bench.series, found)
    if json_file is not None:
        json_file.write_text(line + "\n")
    print(", ".join(f"{name} {value}" for name, value in about.items() if isinstance(value, str | int | float)))
    print(", ".join(f"{name} {value}" for name, value in about["versions"].items()))
    print("".join(f"{name}: {build}\n" for name, build in bench.builds.items()))
    if bench.series:
        print(table(bench.series), end="\n\n")
    if found:
        print(ratio_table(found), end="\n\n")
    if bench.cells:
        print(serving_tables(bench.cells))
    print(line)


def profile(quick: bool) -> None:
    """Prints where the time of a prompt and of a few steps goes, format by format."""
    bench = _bench(quick, {})
    sizes = bench.sizes
    for number_format in sizes.formats:
        with Child(bench.watch, "ours.Ours", *bench.files.ours(number_format), bench.threads) as child:
            print(f"{number_format}\n{child('profile', bench.prompt(0, sizes.context), sizes.new)}\n")
            print(child("profile", bench.prompt(0, sizes.prompt), 0), end="\n\n")


def _bench(quick: bool, sizes: Mapping[str, Any]) -> Bench:
    watch = Watch()
    files = Checkpoint(watch)
    if quick:
        say("a smoke run: its numbers mean nothing")
    tokenizer = Tokenizer.from_pretrained(files.directory)
    texts = ("prose", "manual", "code")
    ids = {name: tokenizer.encode((TEXTS / f"{name}.txt").read_text(encoding="utf-8")) for name in texts}
    return Bench(replace(QUICK if quick else Sizes(), **sizes), usable_cores(), files, ids, watch)
